"""The authors' script piece by piece: words, folders, images, parts and what it hands on."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moso_fast.compat import script
from moso_fast.compat.script import ImageFolder, main
from moso_fast.core.errors import DataError

HALF, ONE = (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)


def save(path: Path, pixels: np.ndarray) -> None:
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.fromarray(pixels.astype(np.uint8)).save(path)


def test_images_are_found_class_by_class(tmp_path) -> None:
    """Any depth and any case of the suffix; folders in order, then names; nothing else."""
    small = np.zeros((2, 2, 3))
    for name in ("b/2.png", "b/10.PNG", "b/deep/1.jpg", "a/z.bmp", "b/1.jpeg", "c d/x.webp"):
        save(tmp_path / name, small)
    (tmp_path / "b" / "notes.txt").touch()
    (tmp_path / "b" / "folder.png").mkdir()
    (tmp_path / "empty").mkdir()
    save(tmp_path / "loose.png", small)
    folder = ImageFolder(tmp_path, 2, HALF, ONE)
    names = [str(path.relative_to(tmp_path)) for path in folder.files]
    assert names == ["a/z.bmp", "b/1.jpeg", "b/10.PNG", "b/2.png", "b/deep/1.jpg", "c d/x.webp"]
    assert folder.targets == [0, 1, 1, 1, 1, 2] and len(folder) == 6  # "empty" is class 3


def test_an_image_is_scaled_cut_and_normalised(tmp_path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3))
    save(tmp_path / "a" / "x.png", pixels)
    mean, std = (0.25, 0.5, 0.75), (0.5, 1.0, 2.0)

    def expected(cut):
        values = np.asarray(cut).transpose(2, 0, 1) / 255 - np.reshape(mean, (3, 1, 1))
        return torch.tensor(values / np.reshape(std, (3, 1, 1)), dtype=torch.float32)

    # As high as asked for: the middle of the width, as it is. Else the shorter side is scaled.
    found, target = ImageFolder(tmp_path, 6, mean, std)[0]
    assert found.shape == (3, 6, 6) and found.dtype == torch.float32 and target == 0
    torch.testing.assert_close(found, expected(pixels[:, 1:7]))
    found, _ = ImageFolder(tmp_path, 4, mean, std)[0]
    image = pillow.fromarray(pixels.astype(np.uint8)).resize((6, 4), pillow.Resampling.BILINEAR)
    torch.testing.assert_close(found, expected(np.asarray(image)[:, 1:5]))
    # Where rounding would fall short of the side by one, it does not: 5 by 3 to 4 is 7 by 4.
    save(tmp_path / "a" / "x.png", pixels[:5, :3])
    found, _ = ImageFolder(tmp_path, 4, mean, std)[0]
    image = pillow.fromarray(pixels[:5, :3].astype(np.uint8)).resize(
        (4, 7), pillow.Resampling.BILINEAR
    )
    torch.testing.assert_close(found, expected(np.asarray(image)[1:5]))
    # Grey images get three channels.
    pillow.fromarray(np.full((4, 4), 51, dtype=np.uint8)).save(tmp_path / "a" / "x.png")
    found, _ = ImageFolder(tmp_path, 4, HALF, ONE)[0]
    torch.testing.assert_close(found, torch.full((3, 4, 4), 0.2 - 0.5))


def test_folders_without_images_are_named(tmp_path, monkeypatch) -> None:
    save(tmp_path / "loose.png", np.zeros((2, 2, 3)))
    for root, message in (
        (tmp_path, f"--data {tmp_path} has no images in one folder a class"),
        (tmp_path / "x", f"--data {tmp_path / 'x'} is no folder"),
    ):
        with pytest.raises(ValueError) as refused:
            ImageFolder(root, 2, HALF, ONE)
        assert str(refused.value) == message
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ValueError) as refused:
        ImageFolder(tmp_path, 2, HALF, ONE)
    assert str(refused.value) == "--data: a folder of images needs pillow: pip install pillow"


def test_the_words_and_what_they_are_without(capsys) -> None:
    needed = ["--path", "p", "--data", "d", "--model", "m:n"]
    found = vars(script._parser().parse_args(needed))
    assert found == {
        "path": Path("p"), "data": "d", "model": "m:n", "num_trails": 8, "samples": 10, "seed": 0,
        "formula": "official_exact", "bs": 256, "device": None, "size": 32,
        "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "output": None,
        "resume": None,
    }  # fmt: skip
    words = ("--num_trails 3 --samples 4 --seed 5 --formula official --bs 6 --device x --size 7 "
             "--mean 1 2 3 --std 4 5 6 --output o --resume r")  # fmt: skip
    found = vars(script._parser().parse_args([*needed, *words.split()]))
    assert list(found.values())[3:] == [
        3, 4, 5, "official", 6, "x", 7, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], Path("o"), Path("r"),
    ]  # fmt: skip
    for k in (0, 2, 4):
        with pytest.raises(SystemExit) as ended:
            main(needed[:k] + needed[k + 2 :])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert (
            f"python -m moso_fast.compat: error: the following arguments are required: {needed[k]}"
            in error
        )
    for words in ("--formula moso", "--mean 1 2", "--size x"):
        with pytest.raises(SystemExit):
            main([*needed, *words.split()])
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "\nWhat differs from the published script: inputs are read without" in text
    assert "Score a data set with the surrogates of the authors' surrogate_training.py." in text


def test_parts_of_every_size() -> None:
    assert script.contiguous_parts(6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
    assert script.contiguous_parts(7, 1) == [range(0, 7)]
    assert script.contiguous_parts(7, 3)[-1] == range(4, 7)
    for parts, most in ((4, 3), (0, 3)):
        with pytest.raises(ValueError) as refused:
            script.contiguous_parts(7, parts)
        assert str(refused.value) == f"--num_trails must be from 1 to {most}, got {parts}"


def test_checkpoints_by_part_and_epoch(tmp_path) -> None:
    names = ("trial_0_3.pth", "trial_0_12.pth", "trial_1_0.pth", "trial_2_0.pth", "trial_0_x.pth",
             "trial_0_1.pth.bak", "other_0_1.pth", "trial_0_1_2.pth")  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    assert script.checkpoint_files(tmp_path, 2) == [
        {3: tmp_path / names[0], 12: tmp_path / names[1]}, {0: tmp_path / names[2]},
    ]  # fmt: skip
    for folder, parts, missing in ((tmp_path, 4, 3), (tmp_path / "none", 1, 0)):
        with pytest.raises(ValueError) as refused:
            script.checkpoint_files(folder, parts)
        assert (
            str(refused.value)
            == f"{folder} has no trial_{missing}_EPOCH.pth (--num_trails {parts})"
        )


def test_epochs_that_every_part_has() -> None:
    files = [dict.fromkeys((9, 1, 5, 7), Path()), dict.fromkeys((1, 2, 5, 9), Path())]
    assert script.draw_epochs(files, 3, 0) == [1, 5, 9]
    pairs = {tuple(script.draw_epochs(files, 2, seed)) for seed in range(20)}
    assert pairs == {(1, 5), (1, 9), (5, 9)}
    assert script.draw_epochs(files, 2, 4) == script.draw_epochs(files, 2, 4)
    for count in (0, 4):
        with pytest.raises(ValueError) as refused:
            script.draw_epochs(files, count, 0)
        assert str(refused.value) == (
            f"--samples must be from 1 to 3, the common epochs; got {count}"
        )


@pytest.mark.parametrize(
    ("targets", "parts", "said"),
    [
        ([0, 0, 1, 1, 2, 2], 3, "holds 1 of 3 classes"),
        ([0, 0, 0, 1, 2, 3, 3, 3], 2, None),  # two of four are half
        ([0, 0, 0, 1, 1, 2, 3, 4], 2, "holds 2 of 5 classes"),
        ([0, 0, 1, 1], 1, None),
        (torch.tensor([0, 0, 1, 1, 2, 2]), 3, "holds 1 of 3 classes"),
        (None, 3, None),
    ],
)
def test_parts_of_few_classes_are_pointed_out(capsys, targets, parts, said) -> None:
    data = types.SimpleNamespace(targets=targets)
    script._point_out_sorted(
        data, script.contiguous_parts(6 if targets is None else len(targets), parts)
    )
    line = (
        f"moso_fast.compat: the data are stored class by class: one of the parts {said} "
        "(moso_fast.train_surrogates shuffles first)\n"
    )
    assert capsys.readouterr() == ("", line if said else "")
    script._point_out_sorted(object(), [range(2)] * 2)
    assert capsys.readouterr().err == ""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder of checkpoints that are only named, and a scorer that writes down its calls."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run" / "checkpoint"
    folder.mkdir(parents=True)
    for trial in range(2):
        for epoch in range(3):
            (folder / f"trial_{trial}_{epoch}.pth").touch()
    net, asked = nn.Linear(1, 1), []
    data = [(k, k % 2) for k in range(7)]

    class Scorer:
        error = None

        def __init__(self, model, **options):
            asked.append((model is net, options))

        def score(self, dataset, points, **options):
            asked.append(([item[0] for item in dataset], [vars(p) for p in points], options))
            if self.error is not None and len(dataset) == 4:
                raise self.error
            return types.SimpleNamespace(
                scores=torch.tensor([float(item[0]) for item in dataset]).double()
            )

    def import_object(path, option, finished=None):
        asked.append((path, option, finished))
        return {"m:net": net, "m:data": data, "m:other": 5}[path]

    monkeypatch.setattr("moso_fast.scorer.MoSoScorer", Scorer)
    monkeypatch.setattr(script, "import_object", import_object)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return types.SimpleNamespace(asked=asked, scorer=Scorer, folder=folder)


WORDS = "--path run --data m:data --model m:net --num_trails 2 --samples 2"


def test_what_is_handed_on_and_written(run, capsys) -> None:
    assert main([*WORDS.split(), "--seed", "1", "--bs", "9", "--resume", "kept"]) == 0
    first, second = script.draw_epochs([dict.fromkeys(range(3), Path())], 2, 1)
    shown = capsys.readouterr()
    path = Path("run/score/moso_score.pth")
    assert shown.out == f"{path}: 7 scores, epochs {first}, {second}\n"
    assert shown.err == "part 0: 3 samples, 2 epochs\npart 1: 4 samples, 2 epochs\n"
    data, model, made, *calls = run.asked
    assert data == ("m:data", "--data", None) and model == ("m:net", "--model", nn.Module)
    cpu = torch.device("cpu")
    assert made == (True, {"gradient": "full", "device": cpu, "batch_size": 9})
    for part, (rows, points, options) in enumerate(calls):
        assert rows == [[0, 1, 2], [3, 4, 5, 6]][part]
        files = [Path("run/checkpoint") / f"trial_{part}_{epoch}.pth" for epoch in (first, second)]
        assert [point["source"] for point in points] == files
        assert {point["lr"] for point in points} == {None}
        assert options == {"formula": "official_exact", "resume": Path("kept") / f"trial_{part}"}
    # A sum over two epochs, of which the scorer gives the mean.
    scores = torch.load(path)
    assert scores.tolist() == [0, 2, 4, 6, 8, 10, 12] and scores.dtype == torch.float32
    run.asked.clear()
    words = "--formula official --output new/folder/x.pth --device cpu"
    assert main([*WORDS.split(), *words.split()]) == 0
    assert run.asked[3][2] == {"formula": "official", "resume": None}
    assert run.asked[2][1]["batch_size"] == 256
    assert torch.load("new/folder/x.pth").tolist() == scores.tolist()
    assert capsys.readouterr().out.startswith("new/folder/x.pth: 7 scores, epochs ")


def test_the_gpu_is_taken_where_there_is_one(run, monkeypatch) -> None:
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        script, "usable_device", lambda *words: given.append(words) or torch.device("cpu")
    )
    assert main(WORDS.split()) == 0 and main([*WORDS.split(), "--device", "meta"]) == 0
    assert given == [("cuda", "--device"), ("meta", "--device")]


def test_errors_speak_of_the_whole_data_set_in_one_line(run, capsys) -> None:
    run.scorer.error = DataError("row {row}\n is {value}", row=2, value=0.5)
    assert main(WORDS.split()) == 2
    assert capsys.readouterr().err == (
        "part 0: 3 samples, 2 epochs\nmoso_fast.compat: part 1: row 5 is 0.5\n"
    )
    assert not Path("run/score").exists()
    for error in (OSError("a file"), TypeError("a type")):
        run.scorer.error = error
        assert main(WORDS.split()) == 2
        assert capsys.readouterr().err.endswith(f"\nmoso_fast.compat: {error}\n")
    run.scorer.error = KeyError("x")  # a fault of the program
    with pytest.raises(KeyError):
        main(WORDS.split())
    capsys.readouterr()
    assert main(WORDS.replace("m:net", "m:other").split()) == 2
    assert capsys.readouterr().err == "moso_fast.compat: --model m:other must give an nn.Module\n"


def test_a_folder_with_a_colon_in_its_name_is_a_folder(run, monkeypatch, capsys) -> None:
    made = []
    monkeypatch.setattr(script, "ImageFolder", lambda *given: made.append(given) or [(0, 0)] * 7)
    Path("a:b").mkdir()
    words = WORDS.replace("m:data", "a:b")
    assert main([*words.split(), "--size", "9", "--mean", "1", "2", "3"]) == 0
    assert made == [(Path("a:b"), 9, [1.0, 2.0, 3.0], (0.2023, 0.1994, 0.2010))]
    assert main(WORDS.replace("m:data", "plain").split()) == 0
    assert made[1] == (Path("plain"), 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
