from cs336.utils.terminal import visible


def test_control_characters_are_replaced():
    assert visible("a\x1b[2Jb\x07\n\tc\x9b") == "a\ufffd[2Jb\ufffd\n\tc\ufffd"
    assert visible("naïve 日本語 😀") == "naïve 日本語 😀"
