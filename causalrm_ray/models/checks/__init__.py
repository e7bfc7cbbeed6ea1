"""Is a model fit for its role? Found out from its files, without reading a weight, before anything heavy starts.

files: configuration, headers of weights --> skeleton: the model without its weights --> tokens: tokenizer, template, embedding
--> saved and read again
"""
