"""README's main journey on a log and a model of the user's own, and the commands beside it: doctor, evaluate, compare."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.qwen2 import Qwen2ForCausalLM

from causalrm_ray import RewardModel
from causalrm_ray.models.states.pooled import STATES

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOPICS = (
    "my invoice",
    "the export",
    "two-factor login",
    "the calendar",
    "a refund",
    "the API key",
    "dark mode",
    "the mobile app",
)
HELPFUL = "Open Settings, choose {}, and press Save. It takes effect within a minute."
VAGUE = "Sorry, I do not know. Please contact somebody about {}."
SURFACES = ("web", "mobile")
METHODS = ["naive", "causalrm_dr", "auto", "oracle"]  # that compare compares
NO_CLUSTER = ["cluster.address=in-process", "rollout.engine=hf", "rollout.generators=1", "learner.ranks=1", "reward.workers=0"]


def product_log(rows: int) -> list[dict[str, object]]:
    """Support answers: helpful ones are liked, a tenth of the votes is flipped, and on mobile only what was liked gets one."""
    rng = random.Random(0)
    log = []
    for number in range(rows):
        topic, surface = rng.choice(TOPICS), rng.choice(SURFACES)
        liked = rng.random() < 0.5
        chance = (0.5 if liked else 0.05) if surface == "mobile" else 0.3
        vote = None if rng.random() > chance else ("upvote" if liked != (rng.random() < 0.1) else "downvote")
        log.append(
            {
                "id": f"shown-{number}",
                "prompt": f"How do I change {topic}?",
                "response": (HELPFUL if liked else VAGUE).format(topic),
                "signal": vote,
                "time": f"2026-05-04T10:{number // 60 % 60:02d}:{number % 60:02d}Z",
                "context": {"surface": surface},
            }
        )
    return log


def product_model(folder: Path, texts: list[str]) -> None:
    """A tiny Qwen2 with random weights, its own tokenizer and a ChatML template, as the embedded world has none."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    ends = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHATML, "model_max_length": 512}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, **size, **ids)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def job(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "jobs", *words], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the product's log.jsonl, prompts.jsonl and model/, and the runs made from them."""
    folder = tmp_path_factory.mktemp("product")
    log = product_log(1200)
    rows = [json.dumps(row) for row in log]
    rows.insert(7, '{"id": "broken", "prompt": "no answer was logged", "signal": "upvote", "time": "2026-05-04T10:00:00Z"}')
    (folder / "log.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    prompts = [json.dumps({"prompt": f"How do I change {topic}?"}) for topic in TOPICS]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    product_model(folder / "model", [str(row[part]) for row in log for part in ("prompt", "response")])
    return folder


def own(folder: Path, name: str) -> list[str]:
    models = [f"model.reward={folder / 'model'}", "model.max_length=128"]
    return [f"run.dir={folder / 'runs'}", f"run.name={name}", f"feedback.source={folder / 'log.jsonl'}", *models]


@pytest.mark.timeout(1800)
def test_fit_reward_learns_from_the_users_own_log(product: Path) -> None:
    done = job("fit-reward", *own(product, "mine"), "reward.workers=1")
    run = product / "runs" / "mine"
    assert "report.html" in done.stdout
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["import"]["quarantined"] == 1
    assert '"row": 8,' in (run / "quarantine.jsonl").read_text(encoding="utf-8")  # the broken row, by its number
    ranking = json.loads((run / "diagnostics.json").read_text(encoding="utf-8"))["ranking"]
    assert ranking["contrast"] > 3 * ranking["stderr"]  # held-out feedback confirms what the model ranks higher
    folder = run / summary["reward_fit"]["folders"]["auto"]
    model, asked = RewardModel.load(folder), "How do I change dark mode?"
    good, bad = model.score_batch([asked, asked], [HELPFUL.format("dark mode"), VAGUE.format("dark mode")])
    assert good > bad + 0.3
    assert summary["propensity"]["choice"]["states"] in STATES
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20, "heads, and the name of the backbone"


@pytest.mark.timeout(1800)
def test_a_whole_model_is_a_classifier_to_other_libraries_and_needs_no_second_pass_for_states(product: Path) -> None:
    options = ["reward.tune=full", "reward.workers=0", "reward.compare=[]", "cluster.address=in-process", "rollout.engine=hf"]
    done = job("fit-reward", *own(product, "whole"), *options, "rollout.generators=1", "learner.ranks=1")
    assert "computing states" not in done.stdout, "the fit before computed them"
    run = product / "runs" / "whole"
    folder = run / json.loads((run / "summary.json").read_text(encoding="utf-8"))["reward_fit"]["folders"]["auto"]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = {"role": "user", "content": "How do I change dark mode?"}
    answers = [HELPFUL.format("dark mode"), VAGUE.format("dark mode")]
    with torch.inference_mode():
        logits = [
            float(
                model(
                    **tokenizer.apply_chat_template([asked, {"role": "assistant", "content": answer}], return_tensors="pt")
                ).logits
            )
            for answer in answers
        ]
    ours = RewardModel.load(folder).logits([asked["content"]] * 2, answers)
    assert logits == pytest.approx(ours.tolist(), abs=1e-4)
    assert logits[0] > logits[1] + 0.5


@pytest.mark.timeout(1800)
def test_train_policy_tunes_the_users_own_model_on_it(product: Path) -> None:
    rollout = ["rollout.max_new_tokens=24", "rollout.prompts_per_step=8", "rollout.generators=1"]
    small = ["learner.ranks=1", "reward.workers=1", "loop.steps=2", "loop.checkpoint_every=0"]
    prompts = [f"feedback.prompts={product / 'prompts.jsonl'}", f"model.policy={product / 'model'}"]
    job("train-policy", *own(product, "tuned"), "world.users=none", *prompts, *rollout, *small)
    run = product / "runs" / "tuned"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["policy_version"], summary["steps"]) == (2, 2)
    assert summary["logprob_mismatch"]["max_abs"] <= 1e-4  # vLLM and the learner in fp32 differ by rounding only
    policy = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-2" / "policy")
    assert policy.config.model_type == "qwen2"
    assert (run / "report.html").exists()


@pytest.mark.timeout(900)
def test_doctor_finds_this_machine_able() -> None:
    assert "vllm" in job("doctor").stdout


@pytest.mark.timeout(900)
def test_evaluate_scores_the_embedded_policy(tmp_path: Path) -> None:
    job("evaluate", f"run.dir={tmp_path}", *NO_CLUSTER, "loop.evaluation_prompts=40")
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text(encoding="utf-8"))
    assert 0 < summary["oracle_reward"]["mean"] < 4
    assert sum(summary["levels"]) == 40


@pytest.mark.timeout(1800)
def test_compare_continues_to_a_table_of_every_method_and_both_kinds_of_users(tmp_path: Path) -> None:
    """One of its six worlds is measured here; the others are there already, as after an interruption."""
    small = ["world.impressions=600", "world.feedback_rate=0.5", "rollout.prompts_per_step=8", "reward.epochs=1"]
    loop = ["loop.steps=1", "loop.evaluation_prompts=20"]
    done = [(users, seed) for users in ("protocol", "strong_feelings") for seed in range(3)][1:]
    rows = [f"{users},{seed},{method},2.0,0.5,0.9,0.9" for users, seed in done for method in METHODS]
    (tmp_path / "compare").mkdir()
    results = tmp_path / "compare" / "results.csv"
    results.write_text("\n".join(["users,seed,method,oracle_reward,flashy,r2,auroc", *rows]) + "\n", encoding="utf-8")
    (tmp_path / "compare" / "config.yaml").write_text("run: {name: compare}\n", encoding="utf-8")
    job("compare", f"run.dir={tmp_path}", "resume=true", *NO_CLUSTER, *small, *loop)
    measured = [line for line in results.read_text(encoding="utf-8").splitlines() if line.startswith("protocol,0,")]
    assert [line.split(",")[2] for line in measured] == METHODS
    assert all(0 <= float(line.split(",")[3]) <= 4 for line in measured)
    assert (tmp_path / "compare" / "comparison.png").exists()
