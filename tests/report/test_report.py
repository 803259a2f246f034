import io
import json
import re
import urllib.error
import urllib.request
from threading import Thread

import matplotlib.image
import numpy as np
import pytest

from oapl_jax.cli import commands
from oapl_jax.io import metrics
from oapl_jax.io.console import ExitCode
from oapl_jax.io.json_lines import LineFile
from oapl_jax.io.run_dir import LAYOUT, RUN_FILE
from oapl_jax.report import curves, findings, page, picture, record, report, server
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict


def make_group(index, version, response="7 4 1"):
    rollout = Rollout(np.arange(3, dtype=np.int32), np.full(3, -0.5, np.float32), FinishReason.STOP)
    graded = [
        GradedRollout(rollout, f"{response} {i}", Grade(verdict, reward), advantage=reward - 0.6)
        for i, (verdict, reward) in enumerate([(Verdict.CORRECT, 1.0), (Verdict.WRONG, 0.0)])
    ]
    prompt = Prompt(f"chain/train/{index}", np.arange(4, dtype=np.int32), f"3+4 & <{index}>=", "7")
    return RolloutGroup(index, version, prompt, tuple(graded), value=0.6)


def make_run(run_dir, steps=100, sync_every=25):
    """A run directory as training leaves it, with numbers like those of a real run."""
    rng = np.random.default_rng(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text("run:\n  dir: runs/demo\n  steps: 100\n")
    with metrics.MetricsWriter(run_dir) as writer:
        for step in range(1, steps + 1):
            done, lag = step / steps, (step - 1) % sync_every
            reward = 0.27 + 0.65 * done**0.7 + rng.normal(0, 0.04)
            line = {
                "rollouts/reward": reward,
                "rollouts/pass_rate": reward,
                "rollouts/response_tokens": 6 + rng.normal(0, 0.1),
                "rollouts/truncated": 0.1 - 0.1 * done,
                "learner/residual": 0.35 - 0.2 * done + rng.normal(0, 0.02),
                "learner/advantage_abs": 0.38 - 0.25 * done + rng.normal(0, 0.02),
                "learner/log_ratio": -0.03 * lag,
                "learner/log_ratio_abs": 0.08 * lag**0.5,
                "learner/entropy": 0.9 - 0.7 * done + rng.normal(0, 0.02),
                "learner/seconds": 8.0 if step == 1 else 0.1 + rng.gamma(2, 0.02),
                "learner/wait_seconds": 5.0 if step == 1 else rng.gamma(1, 0.02),
                "window/lag": lag,
            }
            if lag == sync_every - 1:
                line |= {"sync/seconds": 0.1, "evaluation/pass@1": reward, "evaluation/pass@4": reward**0.4}
            writer.write(step, line)
    summary = {
        "before": {f"pass@{2**i}": 0.27 ** (1 / (1 + i)) for i in range(7)},
        "after": {f"pass@{2**i}": 0.92 ** (1 / (1 + i)) for i in range(7)},
        "steps": steps,
        "seconds": 4000.4,
        "rollouts": steps * 128,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    log = RolloutLog(run_dir / "rollouts")
    log.append([make_group(0, 0, "first"), make_group(1, 0)])
    log.append([make_group(0, 3, "last")])
    return run_dir


def add_evaluations(run_dir, *correct):
    """Evaluations after steps 0, 10, ...: of each prompt the number of its four samples that are correct."""
    file = LineFile(run_dir / "evaluations.jsonl")
    for i, counts in enumerate(correct):
        ids = [f"chain/test/{j}" for j in range(len(counts))]
        file.append({"step": 10 * i, "prompts": ids, "graded": [4] * len(counts), "correct": counts})


def data_in(html):
    """What the page's script draws."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(found)


def render(*run_dirs):
    return page.render(report.read_runs(run_dirs))


def shown(run_dir):
    """What a page has of a run."""
    return data_in(render(run_dir))["runs"][0]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "demo")
    assert report.write_report(run_dir) == run_dir / "report.html"
    return run_dir


def test_the_report_is_one_file_that_fetches_nothing(run_dir):
    html = (run_dir / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\((?!#)""", html)
    assert "default-src 'none'" in html


def test_the_report_shows_the_numbers_of_the_summary_and_the_config(run_dir):
    run = shown(run_dir)
    assert "Held-out pass@1 went from 0.270 to 0.920 (+65.0 points; no interval" in run["verdict"]
    held_out = run["curves"]["evaluation/pass@1"]
    assert (held_out["x"], held_out["y"][0]) == ([0, 25, 50, 75, 100], 0.27)
    assert run["facts"] == {"steps": 100, "rollouts": 12_800, "seconds": 4000.4}
    assert run["scores"][1]["k"] == [1, 2, 4, 8, 16, 32, 64]
    assert "dir: runs/demo" in run["config"]
    assert run["command"] == f"oapl-jax sft --config {run_dir}/config.yaml run.dir={run_dir}"


def test_whole_groups_of_all_versions_are_shown_with_what_their_rollouts_have(run_dir):
    groups = shown(run_dir)["groups"]
    assert [(group["id"], group["rollouts"][0]["text"]) for group in groups] == [
        ("000000-00000000", "first 0"),
        ("000000-00000001", "7 4 1 0"),
        ("000003-00000000", "last 0"),
    ]
    assert groups[0]["prompt"] == "3+4 & <0>="
    rollout = {"verdict": "wrong", "reward": 0.0, "advantage": -0.6, "tokens": 3, "finish": "stop"}
    assert groups[0]["rollouts"][1].items() >= rollout.items()
    assert groups[0]["rollouts"][1]["logprob"] == -1.5  # three tokens of -0.5


def test_no_text_of_a_run_can_leave_the_data_or_reach_a_terminal(tmp_path):
    RolloutLog(tmp_path / "rollouts").append([make_group(0, 0, "</script><script>alert(1)</script>\x1b[2J\u202e")])
    html = render(tmp_path)
    assert html.count("<script") == 2
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", html)
    text = data_in(html)["runs"][0]["groups"][0]["rollouts"][0]["text"]
    assert text == r"</script><script>alert(1)</script>\x1b[2J\u202e 0"


def test_every_panel_of_the_picture_draws_what_the_run_recorded(run_dir):
    """Each panel changes when its metrics are removed, so none ignores its data or repeats another panel."""
    found = curves.read_metrics(run_dir / "metrics.jsonl")
    complete = matplotlib.image.imread(io.BytesIO(picture.draw(found)))
    empty = picture.draw(found._replace(curves={}))
    changed = np.abs(complete - matplotlib.image.imread(io.BytesIO(empty))).max(axis=2) > 0.1
    height, width = (size // 3 for size in changed.shape)
    shares = changed[: 3 * height, : 3 * width].reshape(3, height, 3, width).mean(axis=(1, 3))
    assert (shares > 0.005).all(), shares


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "summary.json", "rollouts"])
def test_a_missing_piece_is_empty_and_the_rest_is_shown(tmp_path, missing):
    run_dir = make_run(tmp_path / "demo", steps=3)
    (run_dir / missing).rename(run_dir / "elsewhere")
    run = shown(run_dir)
    parts = {
        "config.yaml": not run["config"],
        "metrics.jsonl": "metrics.jsonl is missing" in run["verdict"],
        "summary.json": "Not finished: the last recorded step is 3, and summary.json is missing" in run["verdict"],
        "rollouts": not run["groups"],
    }
    assert [name for name, is_missing in parts.items() if is_missing] == [missing]


def test_an_empty_run_directory_gets_a_report(tmp_path):
    assert "Nothing recorded yet" in report.write_report(tmp_path).read_text()
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_single_step_and_values_that_are_not_finite_are_drawn(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"rollouts/reward": 0.5, "learner/entropy": float("nan"), "learner/seconds": 0.0})
    assert set(shown(tmp_path)["curves"]) == {"rollouts/reward", "learner/seconds"}


def test_the_middle_of_long_texts_is_omitted_the_more_the_longer_the_page_would_be(tmp_path, monkeypatch):
    RolloutLog(tmp_path / "rollouts").append([make_group(0, 0, "start " + "x" * 10_000)])
    html = render(tmp_path)
    assert "start xxx" in html
    assert "7,008 characters omitted" in html
    monkeypatch.setattr(page, "MOST_BYTES", 5000)
    assert len(json.dumps(data_in(render(tmp_path)))) < 6000


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("path: /models/Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-0.5B-Instruct"),
        ("warm_start: configs/chain_sft.yaml", "chain_sft"),
    ],
)
def test_the_verdict_names_the_model(model, name, tmp_path):
    make_run(tmp_path / "run", steps=4)
    (tmp_path / "run/config.yaml").write_text(f"run:\n  dir: runs/demo\nmodel:\n  {model}\n")
    (read,) = report.read_runs([tmp_path / "run"])
    assert findings.verdict(read).startswith(f"{name} was trained on")


def test_the_verdict_gives_the_gain_with_its_interval_over_prompts(tmp_path):
    run_dir = make_run(tmp_path / "demo", steps=3)
    add_evaluations(run_dir, [0, 1, 2, 3] * 8, [1, 1, 3, 4] * 8, [4, 1, 4, 4] * 8)
    run = shown(run_dir)
    # Mean gain (4 + 0 + 2 + 1) / 16; the interval of 32 prompts is about 2 standard errors of 0.37 / sqrt(32) on each side.
    found = re.search(
        r"from 0.375 to 0.812 \(\+43.8 points, 95 % between (\S+) and (\S+), paired over 32", run["verdict"]
    )
    assert found is not None, run["verdict"]
    np.testing.assert_allclose([float(found[1]), float(found[2])], [43.8 - 12.8, 43.8 + 12.8], atol=1.5)
    assert run["verdict"].endswith("better.")
    assert [score["label"] for score in run["scores"]] == ["before", "step 10", "step 20"]
    assert run["scores"][0]["value"][0] == 0.375
    assert run["solved"]["steps"] == [0, 10, 20]
    assert run["solved"]["shares"][0] == [0.5, 0.75, 1.0]
    assert run["solved"]["shares"][-1] == [0.25, 0.25, 0.25]


def lines(start, end, **changes):
    healthy = {"rollouts/truncated": (0, 0), "learner/entropy": (1, 0.5), "rollouts/reward": (0.2, 0.8)}
    named = {**healthy, **{name.replace("__", "/"): value for name, value in changes.items()}}
    return [{name: ends[i] for name, ends in named.items()} for i in [0] * start + [1] * end]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, None),
        ({"rollouts__same_form": (0.2, 1.0)}, "Reward hacking? 100%"),
        ({"rollouts__same_form": (1.0, 1.0)}, None),  # a form that belongs to the task
        ({"rollouts__copied": (0.0, 0.95)}, "Reward hacking? 95%"),
        ({"rollouts__truncated": (0.0, 0.5)}, "Non-termination: 50%"),
        ({"rollouts__finished_reward": (0.2, 0.1)}, "rewarded that never end"),
        ({"learner__entropy": (2.0, 0.016)}, "Collapse of entropy: from 2.000 to 0.016"),
        ({"rollouts__invalid": (0.0, 0.3)}, "Failing grader: 30%"),
        ({"rollouts__equal_reward_groups": (0.2, 1.0)}, "Stale grader"),
        ({"learner__log_ratio": (0.0, -40.0)}, "log-ratio at the end is -40.0"),
    ],
)
def test_what_is_suspicious_is_said(tmp_path, changes, warning):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step, line in enumerate(lines(10, 10, **changes)):
            writer.write(step, line)
    found = shown(tmp_path)["warnings"]
    assert len(found) == (warning is not None)
    assert warning is None or warning in found[0]


def test_runs_are_compared_by_what_differs_in_their_configs(tmp_path):
    runs = [make_run(tmp_path / name, steps=3) for name in ("one", "two")]
    (runs[1] / "config.yaml").write_text("run:\n  dir: runs/other\n  steps: 100\nlearner:\n  learning_rate: 3e-4\n")
    data = data_in(render(*runs))
    assert [run["name"] for run in data["runs"]] == ["one", "two"]
    assert data["differences"] == [["learner.learning_rate", ["-", "3e-4"]]]


def test_groups_say_when_they_were_trained_on(tmp_path):
    run_dir = make_run(tmp_path / "demo", steps=3)
    file = LineFile(run_dir / "batches.jsonl")
    for step, names in ((1, ["000000-00000001"]), (2, ["000000-00000001", "000003-00000000"])):
        file.append({"step": step, "policy_version": 0, "groups": names, "digests": ["0"] * len(names)})
    found = record.read_run(run_dir)
    assert found.trained_at == {"000000-00000000": [], "000000-00000001": [1, 2], "000003-00000000": [2]}
    assert found.num_trained == 2


def test_the_command_writes_the_report_and_refuses_what_is_no_run(tmp_path, capsys):
    (tmp_path / RUN_FILE).write_text(json.dumps({"layout": LAYOUT, "version": "0"}))
    assert commands.main(["report", str(tmp_path)]) == ExitCode.DONE
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert commands.main(["report", str(tmp_path / "nowhere")]) == ExitCode.USAGE
    assert "nowhere' is no run directory" in capsys.readouterr().err


def get(address, host=None):
    request = urllib.request.Request(address, headers={} if host is None else {"Host": host})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def test_the_server_follows_a_run_and_pages_through_all_rollouts(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_SHORTEST", 0.0)
    monkeypatch.setattr(server, "_SHARE", 0)
    run_dir = make_run(tmp_path / "demo", steps=3)
    with server.ReportServer([run_dir]) as served:
        thread = Thread(target=served.serve_forever)
        thread.start()
        try:
            (run_dir / RUN_FILE).write_text(json.dumps({"layout": LAYOUT, "version": "0"}))
            words = ["report", str(run_dir), "--serve", "--port", str(served.server_port)]
            assert commands.main(words) == ExitCode.USAGE
            assert data_in(get(served.address))["served"]
            with metrics.MetricsWriter(run_dir, resume_step=3) as writer:
                writer.write(4, {"rollouts/reward": 0.125})
            assert json.loads(get(f"{served.address}data"))["runs"][0]["curves"]["rollouts/reward"]["y"][-1] == 0.125
            pages = [json.loads(get(f"{served.address}rollouts?run=0&number={i}")) for i in range(2)]
            assert [[group["id"] for group in found["groups"]] for found in pages] == [
                ["000000-00000000", "000000-00000001"],
                ["000003-00000000"],
            ]
            assert pages[0]["pages"] == 2
            for path, host, code in (
                ("", "evil.example", 403),
                ("../config.yaml", None, 404),
                ("rollouts?run=9", None, 500),
            ):
                with pytest.raises(urllib.error.HTTPError) as error:
                    get(served.address + path, host)
                assert error.value.code == code
        finally:
            served.shutdown()
            thread.join()
