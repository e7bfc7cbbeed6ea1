"""The options of `feedback`, as a user writes them, say where a log comes from and how it is read."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from causalrm_ray.config.options import dump_config, load_config
from causalrm_ray.data.log.store import open_log
from causalrm_ray.errors import ConfigError
from causalrm_ray.world.grammar import train_prompts
from causalrm_ray.world.pretrain import PretrainSettings, train_tokenizer
from jobs.support.feedback import import_feedback, origin


def test_options_of_the_command_line_read_a_log_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [{"q": "hi", "out": {"text": "hello"}, "key": str(n), "meta": {"at": 1_767_225_600_000 + n}} for n in range(4)]
    (tmp_path / "shown.json").write_text(json.dumps(shown, indent=1))
    (tmp_path / "votes.csv").write_text("about,stars\n0,5\n1,1\n2,3\n")
    config = load_config(
        None,
        [
            f"run.dir={tmp_path / 'runs'}",
            "world.users=none",
            f"feedback.source=[{tmp_path / 'shown.json'},{tmp_path / 'votes.csv'}]",
            "feedback.columns.prompt=q",
            "feedback.columns.response=out.text",
            "feedback.columns.id=key",
            "feedback.columns.time=meta.at",
            "feedback.columns.impression_id=about",
            "feedback.signals.stars={low: 2, high: 4}",
        ],
    )
    dump_config(config, tmp_path / "config.yaml")
    assert origin(load_config(tmp_path / "config.yaml")) == origin(config)
    report = import_feedback(config, train_tokenizer(train_prompts()[:100], PretrainSettings()))
    assert report is not None
    assert (report["impressions"], report["events"], report["quarantined"], report["formats"]) == (4, 3, 0, ("native",))
    with closing(open_log(config)) as log:
        assert {row["impression_id"]: row["label"] for row in log.snapshot()} == {"0": 1, "1": 0, "2": None, "3": None}
    assert "4 times were milliseconds, by their size, and are read so" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["query=SELECT 1", "events=votes.csv", "columns.prompt=q"])
def test_what_reads_a_source_is_not_passed_over_where_there_is_none(option: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"feedback\.{option[:5]}.* needs feedback\.source, the log that it belongs to, got none"
    ):
        load_config(None, [f"feedback.{option}"])
