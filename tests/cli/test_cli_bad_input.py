"""Bad input on the command line: one line, exit code 2, and no file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_support import SCORE, run

BAD_INPUT = [
    ("foo", "No such command 'foo'"),
    ("score", "Missing option '--output'"),
    (SCORE + " --bogus", "No such option: --bogus"),
    (SCORE + " --seed x", "Invalid value for '--seed'"),
    ("score -o x.parquet", "nothing to score: give --features, --labels and --head"),
    ("score --features F.npy -o o.parquet", "--labels, --head must go with --features"),
    ("score --model m:n -o o.parquet", "--data must go with --model"),
    (SCORE + " --model m:n", "--features and --model exclude each other"),
    (SCORE.replace("F.npy", "no.npy"), "there is no file no.npy"),
    (SCORE.replace("F.npy", "F.txt"), "F.txt must be a .npy or .safetensors file"),
    (SCORE.replace("F.npy", "y.npy"), "features must have shape (N, D), got (90,)"),
    (SCORE.replace("F.npy", "short.npy"), "disagree in D: 6 against 3"),
    (SCORE.replace("y.npy", "few.npy"), "labels must have shape (90,)"),
    (SCORE.replace("y.npy", "bad.npy"), "labels[33] is 99, outside [0, 4)"),
    (SCORE.replace("y.npy", "bad.npy") + " --partition 3", "labels[33] is 99, outside [0, 4)"),
    (SCORE.replace("h0", "no"), "there is no file no.safetensors"),
    (SCORE.replace("h0.safetensors", "h0.safetensors:x"), "no tensor 'x'; there are fc."),
    (SCORE + " --lr 1 --lr 2", "give one --lr for each --head: got 2 for 1"),
    (SCORE + " --lr -1", "--lr must be a number >= 0; got -1.0"),
    (SCORE + " --head c1.pt", "c1.pt states a learning rate and h0.safetensors does not"),
    (SCORE + " --formula x", "formula must be one of moso"),
    (SCORE + " --combine x", "combine must be one of mean, zscore; got 'x'"),
    (SCORE + " --num-steps 0", "num_steps must be"),
    (SCORE + " --partition 0", "parts must be >= 1, got 0"),
    (SCORE + " --partition 60", "every part needs at least 2 samples"),
    (SCORE + " --partition x", "--partition must be a number of parts or an .npy file; got 'x'"),
    (SCORE + " --loss x", "loss must be one of cross_entropy"),
    (SCORE + " --label-smoothing 2", "label_smoothing must be in [0, 1), got 2.0"),
    (SCORE + " --backend x", "backend must be one of auto"),
    (SCORE + " --precision x", "precision must be None or one of highest"),
    (SCORE + " --chunk-size 0", "chunk_size must be"),
    (SCORE + " --nonfinite x", "nonfinite must be one of raise, exclude"),
    (SCORE + " --device x", "--device x cannot be used here"),
    (SCORE.replace("o.parquet", "o.xlsx"), "--output must end in .parquet, .csv, .npz"),
    (SCORE.replace("o.parquet", "no/o.parquet"), "the folder no does not exist"),
    ("score --model cli_user_module --data x:y -o o.npz", "--model must be MODULE:NAME"),
    ("score --model no_such:n --data x:y -o o.npz", "there is no module 'no_such'"),
    ("score --model cli_user_module:no --data x:y -o o.npz", "no 'no' in cli_user_module"),
    ("score --model cli_user_module:data --data x:y -o o.npz", "must give an nn.Module"),
    (
        "score --model cli_user_module:net --data cli_user_module:data --checkpoint no.pt -o o.npz",
        "checkpoint no.pt does not exist",
    ),
    ("prune --scores s.npz --keep 2.0 -o k.npy", "--keep must be a fraction in [0, 1]"),
    ("prune --scores s.npz --keep x -o k.npy", "--keep must be a fraction in [0, 1]"),
    ("prune --scores s.npz --keep 20 -o k.npy", "only 19 of 20 have a score"),
    ("prune --scores s.npz --keep 1 -o k.xyz", "--output must end in .npy, .txt, .csv"),
    ("prune --scores no.npz --keep 1 -o k.npy", "no score table at no.npz"),
    ("prune --scores F.npy --keep 1 -o k.npy", "a score table is a .parquet, .csv, .npz file"),
    ("prune --scores junk.parquet --keep 1 -o k.npy", "junk.parquet is not a score table"),
    ("prune --scores s.npz --keep 1 --balance equal -o k.npy", "--balance equal needs --labels"),
    ("prune --scores s.npz --keep 1 --by x -o k.npy", "no column 'x'; it has score, el2n"),
    ("prune --scores s.npz --keep 1 --method x -o k.npy", "method must be one of top"),
    (
        "prune --scores s.npz --keep 1 --balance equal --labels few.npy -o k.npy",
        "few.npy must hold labels of the whole data set",
    ),
    ("prune --keep 1 -o k.npy", "give the score table: moso-fast prune SCORES ..."),
    ("prune s.npz --scores s.npz --keep 1 -o k.npy", "once: got s.npz and --scores s.npz"),
    ("prune s.npz F.npy --keep 1 -o k.npy", "unexpected extra argument"),
    ("report -o r", "give the score table: moso-fast report SCORES ..."),
    (
        "prune s.npz --keep 1 --balance equal --labels names.npy -o k.npy",
        "names.npy holds <U3, which torch lacks; class names become ids by numpy.unique",
    ),
    ("report --scores s.npz -o F.npy", "--output F.npy is a file; it must be a folder"),
    ("report --scores s.npz -o r --images y.npy", "y.npy must hold (N, H, W)"),
    ("report --scores s.npz -o r --errors few.npy", "few.npy must hold flags"),
]


@pytest.mark.parametrize(("words", "message"), BAD_INPUT)
def test_bad_input_gives_2_in_one_line_and_no_file(scored, capsys, words, message):
    features, labels = np.load("F.npy"), np.load("y.npy")
    np.save("short.npy", features[:, :3])
    np.save("few.npy", labels[:3])
    np.save("names.npy", np.array(["cat", "dog"] * 45))
    labels[33] = 99
    np.save("bad.npy", labels)
    Path("junk.parquet").write_text("hello")
    before = {path.name for path in Path().iterdir()}
    result = run(capsys, words, code=2)
    assert message in result.err
    assert result.err.startswith("moso-fast: ") and result.err.count("\n") == 1
    assert result.out == ""
    assert {p.name for p in Path().iterdir() if p.name != "__pycache__"} <= before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--loss x", "loss must be one of"),
        ("--label-smoothing 2", "label_smoothing must be in"),
        ("--precision x", "precision must be None or one of"),
        ("--nonfinite x", "nonfinite must be one of"),
        ("--formula x", "formula must be one of"),
        ("--combine x", "combine must be one of"),
        ("--num-steps 0", "num_steps must be"),
        ("--ignore-index 9223372036854775808", "ignore_index must fit 64 bits"),
    ],
)
@pytest.mark.parametrize("missing", ["F.npy", "y.npy", "h0.safetensors"])
def test_a_bad_option_is_found_before_any_file_is_opened(folder, capsys, option, message, missing):
    Path(missing).unlink()
    assert message in run(capsys, f"{SCORE} {option}", code=2).err
