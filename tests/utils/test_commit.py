import subprocess

from cs336.utils import commit


def test_the_commit_of_a_clone(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(commit, "ROOT", tmp_path)
    assert commit.commit() is None
    git("init", "-q")
    assert commit.commit() is None  # nothing is committed
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-qm", "one")
    assert commit.commit() == git("rev-parse", "--short", "HEAD")
    (tmp_path / "file").write_text("two")
    assert commit.commit().endswith("+")
