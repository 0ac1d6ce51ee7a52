"""Cards of the shipped models say what examples/model_card.py writes of them, measured distances aside."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import model_card

    return model_card


@pytest.mark.parametrize(
    ("name", "guidance", "command"),
    [
        (
            "dit-fashion-mnist-32",
            1.5,
            "python examples/train_dit.py --data fm/usr/share/datasets/fashion-mnist --out dit",
        ),
        (
            "sd-cifar10",
            3.0,
            "python examples/train_latent.py --data cifar10.npz --autoencoder vae/vae --out sd",
        ),
    ],
    ids=["transformer", "text-to-image"],
)
def test_shipped_card_is_what_the_script_writes(
    script: ModuleType, name: str, guidance: float, command: str
) -> None:
    """Its commands find what those before them leave, though records have the last part of paths alone."""
    folder = ROOT / "models" / name
    shipped = (folder / "README.md").read_text()
    last = re.findall(r"^python examples/model_card.py .*$", shipped, re.M)
    assert len(last) == 1
    words = script.command_line(script.__file__, shlex.split(last[0])[2:])
    sampling = script.Sampling(20, 0, guidance, 50)
    curve = script.read_curve(folder / "loss.csv")
    card = script.Card(script.load_model(folder), sampling, curve, None, "Not measured.", words)
    wanted = re.sub(r"(?<=## Quality\n\n).*?(?=\n\n## Data)", "Not measured.", shipped, flags=re.S)
    assert script.render(card) == wanted
    assert command in shipped


def test_record_of_latents_tells_that_mirror_images_were_among_them() -> None:
    record = json.loads((ROOT / "models" / "sd-cifar10" / "training.json").read_text())
    assert record["flips"] is True
