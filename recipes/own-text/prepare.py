#!/usr/bin/env python3
"""Makes training data out of one's own texts: data/text.jsonl and data/chat.jsonl beside this file.

  prepare.py TEXT...

Texts are UTF-8, plain or Markdown. Each becomes a document; and conversations are made of it in which somebody quotes
the beginning of a passage, or names a heading, and the answer is what the text says there: what a small model can learn
in minutes. Python's standard library only.
"""
import argparse
import json
import os
import random
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ASK = ["Go on: {}", "How does it go on? {}", "{} What comes next?", "Continue: {}"]
ABOUT = ["What do you know about {}?", "Tell me about {}.", "{}?", "What is said of {}?"]
LONGEST = 900  # characters of an answer


def shortened(text, most=LONGEST):
    """Whole sentences, as many as fit."""
    if len(text) <= most:
        return text
    end = max(text.rfind(mark, 0, most) for mark in (". ", "! ", "? ", ".\n", "\n"))
    return text[:end + 1].strip() if end > 0 else text[:most].rsplit(" ", 1)[0]


def conversations(text, rng):
    heading = None
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip()
        title = re.fullmatch(r"#{1,6}\s+(.+)", paragraph)
        if title:
            heading = title.group(1).strip("# ")
            continue
        if len(paragraph) < 80:
            continue
        if heading:
            yield rng.choice(ABOUT).format(heading), shortened(paragraph)
            heading = None
        sentences = re.split(r"(?<=[.!?])\s+", paragraph)
        for at in range(1, len(sentences)):
            before, after = sentences[at - 1], shortened(" ".join(sentences[at:]))
            if len(before) >= 20 and len(after) >= 20:
                yield rng.choice(ASK).format(shortened(before, 300)), after


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--out", default=os.path.join(HERE, "data"), help="folder to write")
    options = parser.parse_args()
    rng = random.Random(1)
    documents, chats = [], []
    for path in options.texts:
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            print(f"prepare.py: {path}: {error}", file=sys.stderr)
            return 2
        if text.strip():
            documents.append({"text": text})
            chats += conversations(text, rng)
    if not documents or not chats:
        print("prepare.py: the texts hold no passages of a few sentences", file=sys.stderr)
        return 2
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, "text.jsonl"), "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    with open(os.path.join(options.out, "chat.jsonl"), "w", encoding="utf-8") as file:
        for user, assistant in chats:
            file.write(json.dumps({"messages": [{"role": "user", "content": user},
                                                {"role": "assistant", "content": assistant}]}, ensure_ascii=False) + "\n")
    size = sum(len(document["text"]) for document in documents)
    print(f"{len(documents)} documents, {size} characters, {len(chats)} conversations in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
