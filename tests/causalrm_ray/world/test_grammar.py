from __future__ import annotations

import itertools
import random

import pytest

from causalrm_ray.world import grammar
from causalrm_ray.world.grammar import LENGTHS, OPENERS, STYLES, Parsed

TRAITS = list(itertools.product(OPENERS, STYLES, LENGTHS))


def test_parse_undoes_compose_for_every_prompt_and_trait():
    rng = random.Random(0)
    prompts = grammar.train_prompts() + grammar.evaluation_prompts()
    for turn, prompt in enumerate(prompts):
        intent, topic = grammar.parse_prompt(prompt)
        deed, style, length = TRAITS[turn % len(TRAITS)]
        response = grammar.compose(topic, deed, style, length, rng)
        assert grammar.parse(prompt, response) == Parsed(intent, topic, *deed, style, length), (prompt, response)


def test_parse_undoes_compose_for_every_topic_and_trait():
    rng = random.Random(1)
    for topic, (deed, style, length) in itertools.product(grammar.TOPICS, TRAITS):
        response = grammar.compose(topic, deed, style, length, rng)
        parsed = grammar.parse(f"how do i clean {topic}?", response)
        assert parsed == Parsed("benign", topic, *deed, style, length), response


def test_no_text_has_two_meanings():
    texts = [text for templates in OPENERS.values() for line in templates for text in grammar._expand(line)]
    texts += [text for templates in grammar.FOLLOW_UPS.values() for line in templates for text in grammar._expand(line)]
    assert len(texts) == len(set(texts))
    prompts = grammar.train_prompts() + grammar.evaluation_prompts()
    assert len(prompts) == len(set(prompts)) == 40 * 20 * 7


def test_expansion_lists_every_choice():
    assert sorted(grammar._expand("[a|b] c [d|e f]")) == ["a c d", "a c e f", "b c d", "b c e f"]


def test_topics_occur_nowhere_else_in_the_language():
    lines = [*grammar.FRAMES, *grammar.FLOURISHES, *grammar.FAREWELLS]
    lines += [
        line for group in (grammar.ACTIONS, OPENERS, grammar.FOLLOW_UPS) for templates in group.values() for line in templates
    ]
    words = set(" ".join(lines).replace("[", " ").replace("]", " ").replace("|", " ").split())
    assert not words & set(grammar.TOPICS)


def test_held_out_topics_never_occur_in_train_prompts():
    assert len(grammar.TRAIN_TOPICS) >= 30
    assert len(grammar.EVALUATION_TOPICS) >= 6
    words = set(" ".join(grammar.train_prompts()).replace("?", " ").replace(",", " ").split())
    assert not words & set(grammar.EVALUATION_TOPICS)
    for prompt in grammar.evaluation_prompts():
        assert grammar.parse_prompt(prompt)[1] in grammar.EVALUATION_TOPICS


@pytest.mark.parametrize("prompts", [grammar.train_prompts(), grammar.evaluation_prompts()], ids=["train", "evaluation"])
def test_any_prefix_of_the_prompts_holds_both_intents_evenly(prompts):
    for length in (200, 500, 1000):
        harmful = sum(grammar.parse_prompt(prompt)[0] == "harmful" for prompt in prompts[:length])
        assert abs(harmful / length - 0.5) <= 3 * (0.25 / length) ** 0.5


@pytest.mark.parametrize(
    "response",
    [
        "",
        "the best way is to test lamps every week.",  # another topic
        "the best way is to test locks every week",  # no full stop
        "the best way is to test locks every week. nobody will know.",  # help with a follow-up of comply
        "nobody will know.",  # no opener
        "wow!",
        "wow! the best way is to test locks every week. and more",
        "sorry, i cannot help with locks." + " this could hurt people." * 3,  # four clauses
        "the best way is to test locks and locks every week.",
    ],
)
def test_text_outside_the_grammar_does_not_parse(response):
    assert grammar.parse("how do i clean locks?", response) is None


def test_answer_to_an_unknown_prompt_does_not_parse():
    assert grammar.parse("who are you?", "sorry, i cannot help with locks.") is None
    with pytest.raises(ValueError, match="who are you"):
        grammar.sample_response("who are you?", random.Random(0))


def test_sampled_acts_follow_their_shares():
    rng, n = random.Random(5), 4000
    for prompt in ("how do i clean locks?", "how do i steal locks?"):
        intent, _ = grammar.parse_prompt(prompt)
        parsed = [grammar.parse(prompt, grammar.sample_response(prompt, rng)) for _ in range(n)]
        for deed, share in grammar.ACT_SHARES[intent].items():
            found = sum((one.act, one.severity) == deed for one in parsed) / n
            assert abs(found - share) <= 3 * (share * (1 - share) / n) ** 0.5
