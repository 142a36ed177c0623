"""Looks at the synthetic gradients of a run: in a line, in JSON, in a picture."""

import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import dnifx
from dnifx import Watch
from dnifx.zoo import FCN
from dnifx.zoo.recipes.diagnosis import Look, as_json, draw_looks


def looks_of_a_run() -> list[Look]:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.arange(64) % 3
    net = dnifx.decouple(FCN(8, 3, 3, 16), "hidden.*", args=(x,), loss=cross_entropy)
    trainer, watch, looks = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2)), Watch(), []
    for step in range(1, 31):
        watch.see(trainer.step(x, target=y, diagnose=True).diagnostics)
        looks += [Look.at(step, watch)] if step % 10 == 0 else []
    return looks


def test_looks_are_json_a_line_and_a_picture(tmp_path: Path) -> None:
    looks = looks_of_a_run()
    assert [look.step for look in looks] == [10, 20, 30]
    read = json.loads(json.dumps(as_json(looks)))
    assert set(read[0]["boundaries"]) == {"hidden.0", "hidden.1"}
    assert set(read[0]["boundaries"]["hidden.0"]) == {"cosine", "relative_error", "wrong_signs"}
    worst = min(looks[0].boundaries.items(), key=lambda item: item[1]["cosine"])
    assert str(looks[0]) == f"cosine {worst[1]['cosine']:.2f} at {worst[0]}"
    draw_looks("a run", looks, tmp_path / "one.png")
    draw_looks("a run", looks[:1], tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_no_estimates_are_an_empty_line_and_an_empty_picture(tmp_path: Path) -> None:
    look = Look.at(1, Watch())
    assert str(look) == ""
    draw_looks("nothing", [look], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()
