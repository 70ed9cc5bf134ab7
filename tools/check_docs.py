#!/usr/bin/env python3
"""What documentation and comments point at exists. Usage: tools/check_docs.py [ROOT]; prints each dead pointer.

  comments    `NAME.md 3.1` names a heading "3.1 ..." of docs/NAME.md (`NAME.md 3 to 5, 7`: each of them); `NAME.md` a page of docs/,
              of the root or beside the file
  docs/*.md   a path in backticks (from the root, from src/ or from the page's own folder) is a file or a folder; identifiers in backticks
              right behind it, in the same cell of a table or the same item of a list, are words of that file; a relative link leads to
              a file, and its #anchor to a heading
The log tells what was: its pointers may be gone.
"""
import os
import re
import subprocess
import sys

PAGE = re.compile(r"(?<![\w/-])([\w/-]*\w\.md)((?: \d+(?:\.\d+)?)(?:(?:, | to | and )\d+(?:\.\d+)?)*)?")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
CODE = re.compile(r"`([^`]+)`")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/[\w.-]*|[\w-]+\.(?:h|cpp|cu|cuh|py|sh|md|cmake|json)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)")
COMMENT = re.compile(r"^\s*(?://|#)(.*)|//(.*)")
GENERATED = ("build/", "runs/", ".deps/", "./hadal")


def headings(path):
    with open(path, encoding="utf-8") as page:
        return [match.group(1) for match in map(HEADING.match, page) if match]


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


class Checker:
    def __init__(self, root):
        self.root, self.bad = root, 0
        listed = subprocess.run(["git", "-C", root, "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True,
                                text=True, check=False).stdout.split("\n")
        self.files = [name for name in listed if name and os.path.exists(os.path.join(root, name))]
        self.numbers = {}
        for name in self.files:
            if name.startswith("docs/") and name.count("/") == 1 and name.endswith(".md"):
                self.numbers[name[5:]] = {text.split()[0] for text in headings(os.path.join(root, name)) if text}

    def complain(self, name, line, what):
        print(f"check_docs: {name}:{line}: {what}")
        self.bad += 1

    def exists(self, *places):
        return next((path for path in places if os.path.exists(os.path.join(self.root, path))), None)

    def comments(self, name, lines):
        for number, line in enumerate(lines, 1):
            comment = COMMENT.search(line)
            if not comment:
                continue
            for page, sections in PAGE.findall(comment.group(1) or comment.group(2) or ""):
                page = page.removeprefix("docs/")
                if not self.exists(f"docs/{page}", page, os.path.join(os.path.dirname(name), page)):
                    self.complain(name, number, f"no page {page}")
                for section in NUMBER.findall(sections):
                    if section not in self.numbers.get(page, ()):
                        self.complain(name, number, f"{page} has no section {section}")

    def page(self, name, lines):
        folder, fenced = os.path.dirname(name), False
        for number, line in enumerate(lines, 1):
            if line.startswith("```"):
                fenced = not fenced
            if fenced or line.startswith("    "):
                continue
            self.links(name, number, line, folder)
            for cell in line.split("|") if line.startswith("|") else [line]:
                file = None
                for code in CODE.findall(cell):
                    if PATH.fullmatch(code) and not code.startswith(GENERATED) and not code.endswith(".jsonl"):
                        file = self.exists(code, f"src/{code}", os.path.join(folder, code), f"src/{code}.h", f"src/{code}.cpp")
                        if file is None and self.exists(code.split("/")[0], "src/" + code.split("/")[0]):
                            self.complain(name, number, f"no {code}")
                    elif file and os.path.isfile(os.path.join(self.root, file)) and line.startswith("|"):
                        self.symbol(name, number, file, code)

    def links(self, name, number, line, folder):
        for link in LINK.findall(line):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, part = link.partition("#")
            target = os.path.normpath(os.path.join(folder, path)) if path else name
            if not self.exists(target):
                self.complain(name, number, f"no {link}")
            elif part and target.endswith(".md") and part not in map(anchor, headings(os.path.join(self.root, target))):
                self.complain(name, number, f"{target} has no heading #{part}")

    def symbol(self, name, number, file, code):
        if not re.fullmatch(r"[A-Za-z_][\w:]*", code):
            return
        with open(os.path.join(self.root, file), encoding="utf-8", errors="replace") as source:
            if not re.search(rf"\b{re.escape(code.split('::')[-1])}\b", source.read()):
                self.complain(name, number, f"{file} does not have {code}")

    def run(self):
        for name in self.files:
            with open(os.path.join(self.root, name), encoding="utf-8", errors="replace") as source:
                if re.fullmatch(r"(src|tests|bench|tools|cmake)/.*\.(h|cpp|cu|cuh|cmake)|tools/.*\.sh|CMakeLists.txt", name):
                    self.comments(name, source)
                elif name.endswith(".md") and (name.startswith("docs/") or "/" not in name) and name != "docs/log.md":
                    self.page(name, source)
        return 1 if self.bad else 0


if __name__ == "__main__":
    sys.exit(Checker(sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..")).run())
