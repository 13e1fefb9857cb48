"""Text from files and servers on the terminal."""


def printable(text: str) -> str:
    """Keep brackets and control characters in a text from meaning anything to rich or the terminal."""
    return "".join(char if char.isprintable() or char in "\n\u00a0" else "?" for char in text).replace("[", r"\[")
