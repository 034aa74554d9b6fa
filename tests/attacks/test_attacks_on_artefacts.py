"""C1 to C9: what a candidate leaves in the place of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from darwin_exp.individual import Reason, Status
from tests.attacks.boxes import CANARY, CLEAN_UP_SECONDS, OK, REWRITES, Box, Oversight, versions

ARTEFACT = (Status.REJECTED, Reason.ARTEFACT)
NO_CHECKPOINT = (Status.CRASHED, Reason.NO_CHECKPOINT)
NAMES = {"model.safetensors", "model.json", "progress.jsonl"}


def test_c1_links_are_not_followed(box: Box, secret_file: Path) -> None:
    for name in box.some("model.json", "model.safetensors"):
        found = box.attack(
            ARTEFACT,
            f"(out / {name!r}).unlink()\n(out / {name!r}).symlink_to({str(secret_file)!r})\n",
            goes_on=False,
        )
        assert name in found.training.message
        assert name not in found.artefacts
    # What is no part of a checkpoint is left where it is.
    link = f"""
    for name in ("progress.jsonl", "metrics.json"):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to("/etc/shadow" if name == "metrics.json" else {str(secret_file)!r})
    """
    found = box.attack(OK, link)
    assert set(found.artefacts) == NAMES - {"progress.jsonl"}
    assert found.training.tokens_claimed is None
    for path in found.folder.rglob("*"):
        assert not path.is_symlink()
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()


def test_c2_pipes_sockets_and_devices_are_not_opened(box: Box) -> None:
    special = """
    import socket
    for path in (out / "model.json", out / "model.safetensors", out / "progress.jsonl"):
        path.unlink()
    os.mkfifo(out / "model.json")
    socket.socket(socket.AF_UNIX).bind("out/model.safetensors")
    try:
        os.mknod(out / "progress.jsonl", 0o020666, os.makedev(1, 5))  # /dev/zero never ends
    except OSError:
        os.mkfifo(out / "progress.jsonl")
    """
    found = box.attack(ARTEFACT, special)
    assert found.artefacts == {}
    assert found.seconds < CLEAN_UP_SECONDS


def test_c3_holes_count_with_the_size_they_claim(box: Box) -> None:
    holes = """
    for size in (1 << 40, 3 << 20):  # a terabyte, or else what a file may have
        for name in ("model.safetensors", "model.json"):
            try:
                os.truncate(out / name, size)
            except OSError as error:
                print(error.strerror)
    """
    before = box.bytes_on_disk()
    found = box.attack(ARTEFACT, holes, training={"file_mb": 4})
    assert found.seconds < CLEAN_UP_SECONDS
    # Both are within the limit of one file, and not within that of all.
    assert set(found.artefacts) <= {"model.safetensors", "progress.jsonl"}
    assert box.bytes_on_disk() - before < 5 << 20


def test_c4_hard_links_bring_nothing_that_is_not_the_candidates(box: Box) -> None:
    link = """
    (out / "progress.jsonl").unlink()
    for source in ("in/train.bin", "job.json", "/etc/passwd"):
        try:
            os.link(source, out / "progress.jsonl")
            print("linked", source)
        except OSError:
            pass
    """
    found = box.attack(OK, link, goes_on=False)
    assert found.metrics == box.honest
    for path in found.artefacts.values():
        assert b"root:" not in path.read_bytes()
    # Two names of one file of its own are two files, and count twice.
    twice = """
    (out / "progress.jsonl").unlink()
    os.link(out / "model.safetensors", out / "progress.jsonl")
    """
    found = box.attack(OK, twice)
    assert found.metrics == box.honest
    assert found.training.tokens_claimed is None
    inodes = {path.stat().st_ino for path in found.artefacts.values()}
    assert len(inodes) == len(found.artefacts)


def test_c5_files_of_other_names_stay_where_they_are(box: Box) -> None:
    names = """
    for name in (b"a\\nb", b"n" * 255, b"\\xff\\xfe", b"...", b"-rf", b" ", b"model.json\\n"):
        with open(b"out/" + name, "wb") as file:
            file.write(b"{}")
    """
    found = box.attack(OK, names)
    assert set(found.artefacts) == NAMES
    assert found.metrics == box.honest


def test_c6_folders_in_folders_are_cleared_away(box: Box) -> None:
    deep = """
    top = os.getcwd()
    for place in ("out", os.environ["TMPDIR"]):
        os.chdir(os.path.join(top, place))
        for _ in range(1000):
            os.mkdir("d")
            os.chdir("d")
    os.chdir(top)
    """
    found = box.attack(OK, deep)
    assert found.metrics == box.honest
    assert found.seconds < 2 * CLEAN_UP_SECONDS


def test_c7_what_changes_after_the_end_is_taken_at_one_moment(box: Box) -> None:
    found = box.attack(OK, REWRITES, oversight=Oversight(pause_seconds=0.05))
    tokens, version, number = versions(found)
    assert number > 0, "nothing was changed"
    assert tokens >= version >= number >= tokens - 1
    assert found.metrics["val_nats"] == box.honest["val_nats"]  # its table has one row more


def test_c8_what_an_archive_could_lead_astray_with_leads_nowhere(box: Box) -> None:
    """Folders, and links that are absolute or lead upwards, where files are fetched as archives."""
    evil = """
    for name in ("model.safetensors", "model.json", "progress.jsonl"):
        (out / name).unlink()
    (out / "model.safetensors").mkdir()
    (out / "model.safetensors" / "up").symlink_to("../../../../../../etc/passwd")
    (out / "model.json").symlink_to("/etc/passwd")
    (out / "progress.jsonl").symlink_to("../job.json")
    """
    found = box.attack(ARTEFACT, evil)
    assert found.artefacts == {}
    left = {path.name for path in found.folder.rglob("*")}
    assert left == {"artefacts", "train.log", "evaluation.json"}


def test_c9_a_checkpoint_that_is_not_whole_costs_only_its_run(box: Box) -> None:
    folder = box.folder / "tried-again"
    for damage in box.some(
        "(out / 'model.safetensors').unlink()\n",
        "os.truncate(out / 'model.safetensors', 0)\n",
        "os.truncate(out / 'model.safetensors', 300)\n",
        "os.truncate(out / 'model.json', 0)\n",
    ):
        found = box.attack(NO_CHECKPOINT, damage, goes_on=False, folder=folder)
        assert found.result.evaluation is None
    # What is left in its folder is not in the way of the next attempt.
    assert box.run(folder=folder).metrics == box.honest
    box.assert_nothing_is_left()
