"""The rendered pictures that the starter models are trained on, kept on disk as one array for each size.

Beside single pictures there are pairs: the same garment from the front and from the back, equal in everything else.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from render_garments import Spec, render, sample_scene, sample_spec

SIZES = ((256, 256), (224, 288), (288, 224))  # width, height: square, portrait, landscape
SHARES = (0.5, 0.35, 0.15)
TROUSERS_SHARES = (0.25, 0.6, 0.15)  # more portrait pictures, as trousers are tall
TROUSERS_SEEDS = 7_000_000  # the first of their seeds
TROUSERS_FOLDS = {"flat": 0.35, "knee": 0.4, "cuffs": 0.15, "half": 0.1}
SCENE_SEEDS = 8_000_000  # likewise
HELD_OUT = 10_000_000  # seeds from here on are never trained on
PAIRS = "twins"  # what the files of pairs are called


def picture_seeds(size: int, count: int) -> np.ndarray:
    """The seeds of the pictures of SIZES[size] in a training set of `count` pictures; no two sizes share one."""
    return np.arange(round(count * SHARES[size])) * len(SIZES) + size


@cache
def picture_specs(size: int, count: int) -> list[Spec]:
    """What the pictures of SIZES[size] in a training set of `count` pictures show."""
    return [sample_spec(int(seed)) for seed in picture_seeds(size, count)]


@cache
def trousers_specs(size: int, count: int) -> list[Spec]:
    """Trousers of SIZES[size], most of them folded somehow; over all sizes 0.6 times `count` of them."""
    seeds = TROUSERS_SEEDS + np.arange(round(0.6 * count * TROUSERS_SHARES[size])) * len(SIZES) + size
    folds = np.random.default_rng([size, 6]).choice(list(TROUSERS_FOLDS), len(seeds), p=list(TROUSERS_FOLDS.values()))
    pairs = zip(seeds, folds, strict=True)
    return [replace(sample_spec(int(seed), "trousers"), fold=str(fold)) for seed, fold in pairs]


@cache
def scene_specs(size: int, count: int) -> list[Spec]:
    """Garments of SIZES[size] on other backgrounds than white; over all sizes 0.6 times `count` of them."""
    seeds = SCENE_SEEDS + np.arange(round(0.6 * count * SHARES[size])) * len(SIZES) + size
    return [sample_scene(int(seed)) for seed in seeds]


SETS = {"pictures": picture_specs, "trousers": trousers_specs, "scenes": scene_specs}


def load_pictures(folder: Path, size: int, of: str = "pictures") -> np.ndarray:
    """The rendered pictures of SIZES[size] of one of SETS, (N, h, w, 3) uint8, memory-mapped, copied on write."""
    return np.load(_file(folder, size, of), mmap_mode="c")


def _file(folder: Path, size: int, of: str) -> Path:
    return folder / f"{of}-{SIZES[size][0]}x{SIZES[size][1]}.npy"


def render_pictures(folder: Path, count: int, sets: Iterable[str] = SETS) -> None:
    """Renders those pictures of `sets` that are missing. Stopped and started again, it goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for of in sets:
        for size, (w, h) in enumerate(SIZES):
            path, n = _file(folder, size, of), len(SETS[of](size, count))
            if not path.exists():
                np.lib.format.open_memmap(path, "w+", np.uint8, (n, h, w, 3)).flush()
            tasks += [(folder, of, size, count, start) for start in range(0, n, 50)]
    done_file = folder / "rendered.jsonl"
    done = set(done_file.read_text().splitlines()) if done_file.exists() else set()
    todo = [t for t in tasks if json.dumps(t[1:]) not in done]
    np.random.default_rng(0).shuffle(todo)
    with ProcessPoolExecutor(os.cpu_count()) as pool, open(done_file, "a") as log:
        for name in tqdm(pool.map(_render_slice, todo), total=len(todo), desc="render", unit="x50"):
            log.write(name + "\n")
            log.flush()


@cache
def pair_specs(size: int, count: int) -> list[Spec]:
    """The garments of SIZES[size] that are rendered as pairs: flat ones, over all sizes a fifth of `count`."""
    flat = (spec for seed in picture_seeds(size, count) if (spec := sample_spec(int(seed))).fold == "flat")
    return list(islice(flat, round(0.2 * count * SHARES[size])))


def load_pairs(folder: Path, size: int) -> np.ndarray:
    """Front and back of pair_specs, (N, 2, h, w, 3) uint8, memory-mapped."""
    return np.load(_pairs_file(folder, size), mmap_mode="r")


def _pairs_file(folder: Path, size: int) -> Path:
    return folder / f"{PAIRS}-{SIZES[size][0]}x{SIZES[size][1]}.npy"


def render_pairs(folder: Path, count: int) -> None:
    """Renders front and back of pair_specs, unless that is done."""
    for size, (w, h) in enumerate(SIZES):
        path = _pairs_file(folder, size)
        if path.exists():
            continue
        specs = pair_specs(size, count)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            pairs = pool.map(_render_pair, specs, [(w, h)] * len(specs), chunksize=20)
            pairs = list(tqdm(pairs, total=len(specs), desc=f"pairs {w}x{h}", mininterval=10))
        np.save(path.with_suffix(".new.npy"), np.stack(pairs))
        path.with_suffix(".new.npy").rename(path)


def _render_pair(spec: Spec, size: tuple[int, int]) -> np.ndarray:
    return np.stack(
        [np.asarray(render(replace(spec, view=view), *size, same_layout=True)) for view in ("front", "back")]
    )


class RenderStream:
    """Renders sets and pairs in the background, all at the same pace, so that training can begin with the first.

    Pictures are kept in `folder` as in render_pictures. Pairs are one set more, each front followed by its back.
    """

    def __init__(self, folder: Path, count: int, sets: Iterable[str], workers: int, slice_length: int = 20):
        folder.mkdir(parents=True, exist_ok=True)
        self.pictures: dict[tuple[str, int], np.ndarray] = {}  # (set, size) -> (N, h, w, 3) uint8
        self._jobs: dict[tuple[str, int], list[Future]] = {}  # one for each slice, in order
        self._slice_length = slice_length
        self._pool, tasks = ProcessPoolExecutor(workers, initializer=os.nice, initargs=(10,)), []
        for of in (*sets, PAIRS):
            for size, (w, h) in enumerate(SIZES):
                specs = _both_views(pair_specs(size, count)) if of == PAIRS else SETS[of](size, count)
                path = folder / f"{of}-{w}x{h}.stream.npy"
                self.pictures[of, size] = np.lib.format.open_memmap(path, "w+", np.uint8, (len(specs), h, w, 3))
                self._jobs[of, size] = []
                starts = range(0, len(specs), slice_length)
                tasks += [
                    (start / len(specs), of, size, path, start, specs[start : start + slice_length])
                    for start in starts
                ]
        for _, of, size, path, start, specs in sorted(tasks, key=lambda task: task[0]):
            self._jobs[of, size].append(self._pool.submit(_render_into, path, start, specs, of == PAIRS))

    def ready(self, of: str, size: int) -> int:
        """How many pictures of a set are there without a gap, counted from the first."""
        jobs = self._jobs[of, size]
        if jobs and jobs[0].done():
            jobs[0].result()  # raises what went wrong; a later mistake only ends the growth of this set
        slices = list(takewhile(lambda job: job.done() and not job.exception(), jobs))
        return min(len(slices) * self._slice_length, len(self.pictures[of, size]))

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _both_views(specs: list[Spec]) -> list[Spec]:
    return [replace(spec, view=view) for spec in specs for view in ("front", "back")]


def _render_into(path: Path, start: int, specs: list[Spec], same_layout: bool) -> None:
    pictures = np.lib.format.open_memmap(path, "r+")  # not flushed: other processes see it, and a disk may be slow
    w, h = pictures.shape[2], pictures.shape[1]
    for i, spec in enumerate(specs, start):
        pictures[i] = np.asarray(render(spec, w, h, same_layout=same_layout))


def _render_slice(task: tuple) -> str:
    """Renders 50 pictures into their array; returns the line that marks the task as done."""
    folder, of, size, count, start = task
    (w, h), specs = SIZES[size], SETS[of](size, count)
    pictures = np.lib.format.open_memmap(_file(folder, size, of), "r+")
    for i, spec in enumerate(specs[start : start + 50], start):
        pictures[i] = np.asarray(render(spec, w, h))
    pictures.flush()
    return json.dumps(task[1:])
