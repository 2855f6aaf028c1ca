"""Test the upload of a release against a stub of the hub's client: calls, and what is never printed."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from lead_fast.cli import dump, load_config
from lead_fast.release import check_repository, main

pytestmark = pytest.mark.quick

TOKEN = "hf_" + "x" * 30


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a finished run without weights."""
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    (tmp_path / "config.toml").write_text(dump(load_config(["--recipe=tiny"])))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "accuracy": 0.5}) + "\n")
    return tmp_path


class Hub:
    """Stub of HfApi that records every call; `whoami` raises `fails`."""

    calls: list[tuple] = []
    fails: Exception | None = None

    def __init__(self, **arguments):
        Hub.calls.append(("init", arguments))

    def whoami(self):
        if Hub.fails:
            raise Hub.fails

    def create_repo(self, repository, **arguments):
        Hub.calls.append(("create", repository, arguments))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **arguments):
        Hub.calls.append(("upload", arguments, sorted(os.listdir(arguments["folder_path"]))))


@pytest.fixture
def hub(monkeypatch):
    Hub.calls, Hub.fails = [], None
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


@pytest.mark.parametrize("more, private", [([], True), (["--public"], False)])
def test_a_release_is_uploaded_to_a_private_repository_unless_asked_otherwise(run, hub, capsys, more, private):
    main([str(run), "--push_to_hub", "me/lead-tiny", *more])
    init, create, upload = hub.calls
    assert init == ("init", {})  # the client finds the token itself
    assert create == ("create", "me/lead-tiny", {"private": private, "repo_type": "model", "exist_ok": True})
    assert upload[1]["repo_id"] == "me/lead-tiny" and upload[1]["folder_path"] == run / "final"
    assert upload[2] == ["README.md", "config.json", "generation_config.json"]
    out = capsys.readouterr()
    assert out.out.splitlines()[-1] == "https://huggingface.co/me/lead-tiny" and TOKEN not in out.out + out.err


def test_nothing_is_uploaded_without_the_flag(run, hub):
    main([str(run)])
    assert hub.calls == []


@pytest.mark.parametrize("name", ["", "lead", "a/b/c", "me/..", "me/x.git", "me/-x", "me/a--b", "../x", "me/a b",
                                  "me/é", "https://huggingface.co/me/x", "me/" + "x" * 97])  # fmt: skip
def test_a_name_that_is_none_is_refused_before_anything_is_written(run, hub, name):
    with pytest.raises(ValueError, match="--push_to_hub is .*: give OWNER/NAME"):
        check_repository(name)
    with pytest.raises(SystemExit, match="error: --push_to_hub is"):
        main([str(run), "--push_to_hub", name])
    assert hub.calls == [] and not (run / "final" / "README.md").exists()


def refused() -> Exception:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response = type("Response", (), {"status_code": 403})()
    return error


@pytest.mark.parametrize(
    "failure, says",
    [(LocalTokenNotFoundError(f"no {TOKEN}"), "set HF_TOKEN"), (refused(), r"The hub refused me/x \(403\)"),
     (HfHubHTTPError.__bases__[0](f"down {TOKEN}"), "cannot be uploaded"), (OSError("no route"), "cannot be uploaded")],
    ids=["token", "refused", "client", "network"],
)  # fmt: skip
def test_what_the_hub_refuses_gets_one_sentence_without_the_token(run, hub, failure, says):
    hub.fails = failure
    with pytest.raises(SystemExit, match=says) as e:
        main([str(run), "--push_to_hub", "me/x"])
    assert TOKEN not in str(e.value) and "\n" not in str(e.value) and [c[0] for c in hub.calls] == ["init"]
