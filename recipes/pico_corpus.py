"""Make pico's corpus, word list, conversations and tokenizer from installed Debian packages.

    apt-get install --no-install-recommends wordnet-base fortunes fortunes-min python3.11-doc
    python recipes/pico_corpus.py runs/pico

Text: WordNet 3.0 glosses (WordNet licence), Python's tutorial and library reference (PSF licence),
fortunes (mostly short quotations). One document in fifty is held out by a hash of its text.
"""

import gzip
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from aprium.base.records import Message
from aprium.data.bpe import train_bpe, write
from aprium.data.rows import read_all
from aprium.envs.families import FAMILIES, draw
from aprium.text.chat import ChatTemplate

HERE = Path(__file__).parent
WORDNET = Path("/usr/share/wordnet")
FORTUNES = Path("/usr/share/games/fortunes")
PYTHON_DOC = Path("/usr/share/doc/python3.11/html/_sources")
FORTUNE_FILES = (
    "computers", "debian", "definitions", "education", "food", "fortunes", "goedel", "kids", "law",
    "linux", "linuxcookie", "literature", "miscellaneous", "news", "people", "pets", "platitudes",
    "riddles", "science", "sports", "startrek", "tao", "wisdom", "work",
)  # fmt: skip
VOCAB_SIZE = 512
# There are few of these questions, and they are the first that people ask.
FAQ_REPEATS = 10
# Words with their space, capitalised words, words before a colon or the end of a line, words in
# tags, single letters, single digits, punctuation runs, white space. Any other small word without a
# space before it begins a reply: reversed or encoded words have no pieces worth learning, so they
# are written letter by letter.
PATTERN = "|".join((
    r" \p{L}+", r"\p{Lu}\p{Ll}+", r"\p{Ll}+(?=[:(\n])", r"(?<=[<>/=_\"])\p{Ll}+",
    r"\p{L}", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
))  # fmt: skip


def held_out(text: str) -> bool:
    """Tell whether a document belongs to the evaluation set."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 // 50


def glosses() -> Iterator[tuple[str, str, int]]:
    """Yield (word, first gloss, how often WordNet's texts use the word), nouns first."""
    counts: Counter[str] = Counter()
    for line in (WORDNET / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        counts[key.split("%")[0]] += int(count)
    seen: set[str] = set()
    for kind in ("noun", "verb", "adj"):
        gloss_at = {}
        for line in (WORDNET / f"data.{kind}").read_text().splitlines():
            if not line.startswith(" "):
                gloss_at[line[:8]] = line.split(" | ", 1)[1].strip()
        for line in (WORDNET / f"index.{kind}").read_text().splitlines():
            word = line.split(" ", 1)[0]
            if not re.fullmatch(r"[a-z]{3,8}", word) or word in seen:
                continue
            seen.add(word)
            offset = next(f for f in line.split() if re.fullmatch(r"\d{8}", f))
            first = re.sub(r'\s*["(].*', "", gloss_at[offset].split(";")[0]).strip()
            if first:
                yield word, first, counts[word]


def documents(defined: list[tuple[str, str, int]]) -> Iterator[str]:
    """Yield the texts of all packages, each once."""
    seen: set[str] = set()
    for text in _raw_documents(defined):
        text = text.strip()
        if 20 <= len(text) and text not in seen:
            seen.add(text)
            yield text


def _raw_documents(defined: list[tuple[str, str, int]]) -> Iterator[str]:
    by_use = sorted(defined, key=lambda item: -item[2])[:12000]
    random.Random(0).shuffle(by_use)
    for begin in range(0, len(by_use), 8):
        yield "\n".join(f"{word}: {gloss}." for word, gloss, _ in by_use[begin : begin + 8])
    for name in FORTUNE_FILES:
        text = (FORTUNES / name).read_text(encoding="utf-8", errors="ignore")
        yield from (part.replace("\t", "    ") for part in text.split("\n%\n") if len(part) < 900)
    for folder in ("tutorial", "library", "howto", "faq"):
        for file in sorted((PYTHON_DOC / folder).glob("*.rst.txt*")):
            yield from _prose(_read(file))


def _read(file: Path) -> str:
    if file.suffix == ".gz":
        return gzip.decompress(file.read_bytes()).decode()
    return file.read_text(encoding="utf-8")


def _prose(text: str) -> Iterator[str]:
    """Yield the plain paragraphs of a reStructuredText file, a few at a time."""
    kept = []
    for paragraph in text.split("\n\n"):
        plain = re.sub(r":\w+(?::\w+)?:`[~!]?([^`<]+?)(?: <[^>]+>)?`", r"\1", paragraph)
        plain = plain.replace("``", "").replace("*", "")
        words = plain.split()
        if plain[:1].isalpha() and len(words) > 12 and ".. " not in plain and "::" not in plain:
            kept.append(" ".join(words))
    for begin in range(0, len(kept), 4):
        yield "\n".join(kept[begin : begin + 4])


def conversations(defined: list[tuple[str, str, int]]) -> Iterator[list[dict[str, str]]]:
    """Yield small conversations: who pico is, greetings, and what common words mean."""
    for row in read_all(HERE / "pico" / "faq.jsonl"):
        for question in row["questions"] * FAQ_REPEATS:
            yield [
                {"role": "user", "content": question},
                {"role": "assistant", "content": row["answer"]},
            ]
    by_use = sorted(defined, key=lambda item: -item[2])[:400]
    for word, gloss, _ in by_use:
        for form in ("What does {} mean?", "Define {}.", "What is the meaning of {}?"):
            answer = f"{gloss[0].upper()}{gloss[1:]}."
            yield [
                {"role": "user", "content": form.format(word)},
                {"role": "assistant", "content": answer},
            ]


def train_tokenizer(texts: list[str], words: list[str], template: ChatTemplate) -> Tokenizer:
    """Train the byte-level BPE on the corpus and on rendered tasks in equal parts."""
    rng = random.Random(0)
    rendered, size = [], sum(map(len, texts))
    while size > 0:
        task = draw(rng.choice(list(FAMILIES)), rng, words, held_out=False)
        messages: list[Message] = list(task.messages(thinking=True))
        text = template.render(messages, task.tools, add_generation_prompt=False)
        # The marks are added tokens of their own and must not shape the merges.
        rendered.append(re.sub(r"<\|im_\w+\|>|</?think>|</?tool_call>", "\n", text))
        size -= len(rendered[-1])
    return train_bpe([*texts, *rendered], VOCAB_SIZE, PATTERN)


def main(output: Path) -> None:
    """Write corpus, conversations, words and tokenizer under `output`."""
    output.mkdir(parents=True, exist_ok=True)
    defined = list(glosses())
    texts = list(documents(defined))
    for name, wanted in (("train", False), ("heldout", True)):
        rows = [json.dumps({"text": t}) for t in texts if held_out(t) == wanted]
        (output / f"text_{name}.jsonl").write_text("\n".join(rows) + "\n")
    chats = [json.dumps({"messages": messages}) for messages in conversations(defined)]
    random.Random(0).shuffle(chats)
    (output / "chat.jsonl").write_text("\n".join(chats) + "\n")
    words = sorted(word for word, _, _ in sorted(defined, key=lambda item: -item[2])[:5000])
    (output / "words.txt").write_text("\n".join(words) + "\n")
    template = ChatTemplate.load(HERE / "pico")
    kept = [t for t in texts if not held_out(t)]
    tokenizer = train_tokenizer(kept, words, template)
    # Nearly greedy: what so small a model says by chance is mostly wrong.
    sampling = {"do_sample": True, "temperature": 0.1, "top_p": 0.95}
    write(tokenizer, output / "tokenizer", HERE / "pico" / "chat_template.jinja", sampling)
    size = sum(map(len, texts)) / 1e6
    counts = f"{len(texts)} documents, {len(chats)} conversations, {len(words)} words"
    print(f"{size:.1f} MB: {counts}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/pico"))
