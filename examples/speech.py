"""Strings of digits, heard by a Speech Transformer in voices that it does not know.

    make data                       # once; needs espeak-ng, which speaks them
    python examples/speech.py       # --attention naive|torch|pyattn, --quick, --data PATH

Voices are held out, and texts that they say are nobody else's in training. What is written is scored by the word error
rate (jiwer). `--data` takes a folder of WAV files with transcripts.tsv: file<TAB>text, and <TAB>speaker if known.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyattn import checks
from pyattn.models import SpeechTransformer, data, speech, text, training

checks.require_extra("models", "jiwer", "matplotlib", "rich", "safetensors", "scipy", "sklearn")

import jiwer  # noqa: E402

RATE, MELS = 8000, 64
SIZE = {"mels": MELS, "dim": 144, "heads": 4, "encoder_layers": 4, "decoder_layers": 2, "hidden": 384, "dropout": 0.1}
STEPS, BATCH, LEARNING_RATE = 1200, 32, 2e-3
HELD_OUT, VALIDATION = 0.12, 0.04  # of the voices
CHARACTERS = "abcdefghijklmnopqrstuvwxyz '"
FIRST = len(text.SPECIAL)  # characters come after the special tokens


def main(args: argparse.Namespace) -> dict[str, Any]:
    recordings = data.read_recordings(args.data) if args.data else data.recordings()
    if args.quick:
        recordings = recordings[:900]
    train, validation, test = text.split(recordings, HELD_OUT, VALIDATION, key=lambda r: r.speaker)
    if not (train and validation and test):
        raise ValueError(f"{args.data} must hold enough speakers to hold some out, got {len(recordings)} recordings")
    unseen = {clean(r.text) for r in (*validation, *test)}
    train = [r for r in train if clean(r.text) not in unseen]
    if not train:
        raise ValueError(f"{args.data} must hold texts that no speaker says who is held out")
    voices = len({r.speaker for r in test})
    print(f"{len(train)} recordings to train on; {len(test)} held out, of {voices} voices that are not heard before")

    about = SIZE | {"vocabulary": FIRST + len(CHARACTERS), "attention": args.attention}
    torch.manual_seed(args.seed)
    model = make(about)
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.steps or (40 if args.quick else STEPS)
    heard = [Heard(part) for part in (train, validation, test)]
    history = training.train(
        model,
        (heard[0].batch(chosen.tolist()) for chosen in training.epochs(len(train), BATCH, generator)),
        lambda b: model.loss(speech.masked(b[0], b[1], generator), *b[1:]),
        steps=steps,
        learning_rate=LEARNING_RATE,
        warm_up=steps // 10,
        evaluate=lambda: model.loss(*heard[1].batch(range(min(256, len(validation))))).item(),
        every=-(-steps // 8),
        title=f"Speech Transformer, {args.attention}",
    )
    path = args.out / "speech.safetensors"
    training.save(path, model, about)
    model = training.load(path, make)

    by_ctc, by_decoder = transcribe(model, heard[2])
    reference = [clean(r.text) for r in test]
    save_samples(args.out / "samples.txt", reference, by_decoder)
    picture(args.out / "speech.png", model, history, heard[2])
    rates = [100 * jiwer.wer(reference, written) for written in (by_ctc, by_decoder)]
    found = training.result(
        "Speech Transformer",
        "word error rate, %, lower is better",
        {"nearest neighbour": 100 * jiwer.wer(reference, nearest(heard[0], heard[2])), "its CTC alone": rates[0]},
        rates[1],
        history,
        digits=2,
    )
    training.print_results([found])
    return {"results": [found]}


def make(about: dict[str, Any]) -> SpeechTransformer:
    return SpeechTransformer(**about)


# ---- recordings and texts ----------------------------------------------------------------------------------


def clean(transcript: str) -> str:
    """In small letters, and what is none of the characters left out."""
    return " ".join("".join(c if c in CHARACTERS else " " for c in transcript.lower()).split())


def spelled(transcript: str) -> list[int]:
    return [text.START, *(FIRST + CHARACTERS.index(c) for c in clean(transcript)), text.END]


def read(tokens: Sequence[int]) -> str:
    return clean("".join(CHARACTERS[token - FIRST] for token in tokens if token >= FIRST))


class Heard:
    """Frames of recordings, and their texts as tokens."""

    def __init__(self, recordings: Sequence[data.Recording]) -> None:
        self.texts = [clean(r.text) for r in recordings]
        self.frames = []
        for recording, written in zip(recordings, self.texts, strict=True):
            if not written:
                raise ValueError(f"{recording.path}: must have a text of the letters a to z, got {recording.text!r}")
            wave = data.read_wave(recording.path, RATE)
            if len(wave) < RATE // 20:
                raise ValueError(f"{recording.path}: must last 50 ms at least, got {1000 * len(wave) // RATE}")
            self.frames.append(speech.log_mel(wave, RATE, MELS))

    def batch(self, chosen: Sequence[int]) -> tuple[torch.Tensor, list[int], torch.Tensor, list[int]]:
        """What ``SpeechTransformer.loss`` is given."""
        rows = [spelled(self.texts[i]) for i in chosen]
        return (*speech.padded([self.frames[i] for i in chosen]), text.padded(rows), [len(row) - 1 for row in rows])


# ---- what it is worth --------------------------------------------------------------------------------------


def transcribe(model: SpeechTransformer, heard: Heard) -> tuple[list[str], list[str]]:
    """What CTC writes, and what the decoder does with four hypotheses; recordings of like lengths at once."""
    order = sorted(range(len(heard.texts)), key=lambda i: len(heard.frames[i]))
    longest = 10 + 2 * max(map(len, heard.texts))
    written = {}
    for first in range(0, len(order), 64):
        chosen = order[first : first + 64]
        frames, lengths, *_ = heard.batch(chosen)
        pairs = zip(model.spell(frames, lengths), model.transcribe(frames, lengths, longest, beams=4), strict=True)
        written |= dict(zip(chosen, pairs, strict=True))
    by_ctc, by_decoder = zip(*(written[i] for i in range(len(order))), strict=True)
    return [read(tokens) for tokens in by_ctc], [read(tokens) for tokens in by_decoder]


def nearest(known: Heard, heard: Heard) -> list[str]:
    """The text of the known recording whose frames, brought to one length, are nearest."""
    from sklearn.neighbors import NearestNeighbors

    def shrunk(frames: Sequence[torch.Tensor]) -> Any:
        even = [torch.nn.functional.interpolate(x.T[None], 40, mode="linear")[0] for x in frames]
        return torch.stack(even).flatten(1).numpy()

    index = NearestNeighbors(n_neighbors=1).fit(shrunk(known.frames))
    return [known.texts[i] for i in index.kneighbors(shrunk(heard.frames), return_distance=False)[:, 0]]


def save_samples(path: Path, reference: Sequence[str], written: Sequence[str], count: int = 30) -> None:
    pairs = list(zip(reference, written, strict=True))[:count]
    lines = [f"{'  ' if is_ == says else '! '}said    {is_}\n  written {says}\n" for is_, says in pairs]
    path.write_text("\n".join(lines))
    print("\n".join(lines[:4]))


def picture(path: Path, model: SpeechTransformer, history: training.History, heard: Heard) -> None:
    """The losses, the frames of one recording, and where in time each character looked."""
    longest = max(range(min(50, len(heard.texts))), key=lambda i: len(heard.texts[i]))
    frames, lengths, tokens, _ = heard.batch([longest])
    looks = model.alignments(frames, lengths, tokens[:, :-1])[0]
    seconds = lengths[0] / 100
    figure, (left, middle, right) = training.figure(1, 3, (15, 5))
    training.draw_losses(left, history, "nats a token")
    middle.imshow(frames[0].T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, MELS))
    middle.set(xlabel="seconds", ylabel="mel band", title="what is heard")
    right.imshow(looks, cmap="Greys", aspect="auto", vmin=0, extent=(0, seconds, len(looks), 0))
    said = [*heard.texts[longest].replace(" ", "_"), "(end)"]
    right.set_yticks([i + 0.5 for i in range(len(said))], said, fontsize=6)
    right.set(xlabel="seconds", ylabel="is written", title="where each character looks")
    figure.suptitle("Speech Transformer, last layer's cross attention", fontweight="bold")
    training.save_figure(path, figure)


if __name__ == "__main__":
    training.run(main, training.parser(__doc__.splitlines()[0], "a folder of WAV files with transcripts.tsv"), "speech")
