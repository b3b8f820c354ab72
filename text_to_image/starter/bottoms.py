"""Sewing patterns of skirt, trousers, shorts and denim jeans, front and back."""

from dataclasses import dataclass

import numpy as np

from cloth import Piece, circle
from sewing import Look, double_stitch, flip, hem, limb, line, mapped, smooth


def skirt(look: Look) -> list[Piece]:
    waist, flare, length = look.vary(0.19), look.vary(0.36, 0.12), look.vary(0.66)
    outline = [
        (-waist, 0),
        (waist, 0),
        (flare * 0.8, length * 0.55),
        (flare, length),
        (0, length + 0.035),
        (-flare, length),
        (-flare * 0.8, length * 0.55),
    ]
    pieces = [Piece("panel", smooth(outline, 3, keep=(0, 1, 3, 5)))]
    for x in np.linspace(-0.85, 0.85, 7) + look.rng.uniform(-0.07, 0.07, 7):
        pieces.append(
            Piece(
                "crease",
                line((x * waist, 0.1), (x * flare * 0.85, 0.4), (x * flare, length)),
                0.024,
                depth=look.rng.uniform(0.4, 1.2),
            )
        )
    pieces += [
        Piece(
            "seam",
            line((-flare * 0.97, length - 0.02), (0, length + 0.012), (flare * 0.97, length - 0.02)),
            0.006,
            depth=0.8,
        )
    ]
    pieces += _waistband(look, waist, loops=False)
    if look.back:
        zip_line = np.array([(0, 0.0), (0, 0.24)])
        slit = np.array([(-0.012, length + 0.05), (0, length - 0.16), (0.012, length + 0.05)])
        return [*pieces, Piece("seam", zip_line, 0.012, depth=1.5), Piece("panel", slit, tint=0.35, puff=0.1)]
    placket = np.array([(0, y) for y in np.arange(0.022, length - 0.04, 0.085)])
    return [
        *pieces,
        Piece("seam", np.array([(-0.024, 0.05), (-0.024, length)]), 0.006),
        Piece("dot", placket, 0.012, colour=look.button),
    ]


def _waistband(look: Look, half: float, loops: bool = True) -> list[Piece]:
    band = np.array([(-half, -0.005), (half, -0.005), (half * 1.03, 0.045), (-half * 1.03, 0.045)])
    pieces = [Piece("panel", band, puff=0.45), *double_stitch(np.array([(-half, 0.045), (half, 0.045)]), look)]
    for x in (-0.75, -0.3, 0.3, 0.75) if loops else ():
        loop = np.array([(-0.008, -0.012), (0.008, -0.012), (0.008, 0.06), (-0.008, 0.06)]) + [x * half, 0]
        pieces.append(Piece("panel", loop, puff=0.3))
    return pieces


def trousers(look: Look, length: float = 1.0, hem_half: float = 0.085) -> list[Piece]:
    """Trousers; shorts with a short `length`; with `look.worn` denim, with faded places and rivets."""
    waist, hip = look.vary(0.180, 0.06), look.vary(0.228, 0.05)
    spread = look.rng.uniform(0.02, 0.10) * length
    crotch, hem_half = look.vary(0.30, 0.04), look.vary(hem_half)
    pieces, knee = [], 0.62 * length
    for mirrored in (flip, lambda p: np.asarray(p, float)):
        foot = np.array([0.120 + spread + look.rng.uniform(-0.01, 0.01), length + look.rng.uniform(-0.008, 0.008)])
        knee_half = hem_half * 0.3 + 0.070
        kx = 0.120 + spread * 0.5
        leg = [
            (-0.012, 0.02),
            (waist, 0.0),
            (hip, 0.2),
            (hip * 0.99 + spread * 0.3, 0.34),
            (kx + knee_half, knee),
            foot + [hem_half, 0],
            foot + [-hem_half, 0.004],
            (kx - knee_half, knee),
            (0.016, crotch + 0.02),
            (-0.012, crotch - 0.02),
        ]
        hem_at = 5
        if length < 0.7:  # shorts: straight from hip and crotch to the hem, no knee between
            hem_at = 4
            leg[3:5] = [(hip + 0.25 * (foot[0] + hem_half - hip), 0.3)]
            leg[6:7] = []
        pieces.append(Piece("panel", mirrored(smooth(leg, 3, keep=(0, 1, hem_at, hem_at + 1)))))
        details = _leg_details(look, _Leg(foot, hem_half, kx, knee, crotch, length))
        pieces += [mapped(piece, mirrored) for piece in details]
    pieces += _seat(look, waist, hip, crotch) if look.back else _fly(look, waist, hip, crotch)
    return (
        pieces
        + _waistband(look, waist)
        + ([] if look.back else [Piece("dot", np.array([(0, 0.02)]), 0.012, colour=look.button)])
    )


@dataclass(frozen=True)
class _Leg:
    """The measures of the leg to the right of the crotch, in garment units."""

    foot: np.ndarray  # middle of the hem
    hem_half: float  # half the width of the hem
    knee_x: float
    knee_y: float
    crotch: float  # y
    length: float

    @property
    def is_long(self) -> bool:
        return self.length > 0.7


def _leg_details(look: Look, leg: _Leg) -> list[Piece]:
    pieces = hem(leg.foot + [-leg.hem_half, 0.0], leg.foot + [leg.hem_half, 0.0], look)
    if leg.is_long:
        pieces += [_inseam(leg), *_knee_creases(look, leg), *_hem_creases(look, leg)]
    pieces += _crotch_creases(look, leg)
    if look.worn is not None and leg.is_long:
        pieces += _faded_places(look, leg)
    return pieces


def _inseam(leg: _Leg) -> Piece:
    hem_end = tuple(leg.foot + [-leg.hem_half + 0.012, 0])
    return Piece("seam", line((0.03, leg.crotch + 0.03), (leg.knee_x - 0.055, leg.knee_y), hem_end), 0.005, depth=0.5)


def _knee_creases(look: Look, leg: _Leg) -> list[Piece]:
    pieces, x = [], leg.knee_x
    for k in range(4):
        y = leg.knee_y + (k - 1.7) * 0.035 + look.rng.uniform(-0.01, 0.01)
        side = look.rng.choice([-1, 1])
        crease = line((x - side * 0.08, y), (x, y + 0.012), (x + side * 0.02, y + 0.03))
        pieces.append(Piece("crease", crease, 0.016, depth=look.rng.uniform(0.25, 0.8)))
    return pieces


def _hem_creases(look: Look, leg: _Leg) -> list[Piece]:
    pieces, x = [], leg.foot[0]
    for k in range(3):
        y = leg.length - 0.16 + k * 0.035
        crease = line((x - 0.06, y), (x + 0.05, y + look.rng.uniform(-0.03, 0.03)))
        pieces.append(Piece("crease", crease, 0.014, depth=look.rng.uniform(0.2, 0.6)))
    return pieces


def _crotch_creases(look: Look, leg: _Leg) -> list[Piece]:
    """Creases that fan out from the crotch."""
    pieces, start = [], np.array([0.02, leg.crotch])
    for k in range(4):
        angle = 0.25 + 0.3 * k + look.rng.uniform(-0.1, 0.1)
        reach = look.rng.uniform(0.07, 0.14)
        crease = line(start, start + reach * np.array([np.cos(angle - 0.6), np.sin(angle - 0.6)]))
        pieces.append(Piece("crease", crease, 0.016, depth=look.rng.uniform(0.3, 0.9)))
    return pieces


def _faded_places(look: Look, leg: _Leg) -> list[Piece]:
    """Worn denim: the thigh, the knee and the edge of the hem."""
    top, x, half, low = 0.2, leg.knee_x + 0.01, 0.055, leg.knee_y + 0.1
    thigh = [(x - half * 0.6, top), (x + half * 0.6, top), (x + half, 0.45)]
    thigh += [(x + half * 0.7, low), (x - half * 0.7, low), (x - half, 0.45)]
    knee = circle(16) * [0.05, 0.1] + [x, leg.knee_y - 0.02]
    edge = limb([leg.foot + [-leg.hem_half, -0.006], leg.foot + [leg.hem_half, -0.006]], (0.02, 0.02))
    return [
        Piece("fade", smooth(thigh, 2), 0.035, depth=0.62, colour=look.worn),
        Piece("fade", knee, 0.03, depth=0.3, colour=look.worn),
        Piece("fade", edge, 0.006, depth=0.55, colour=look.worn),
    ]


def _fly(look: Look, waist, hip, crotch) -> list[Piece]:
    """The front between waistband and crotch: the fly and two curved pockets."""
    fly = line((0.035, 0.045), (0.036, crotch * 0.62), (0.012, crotch * 0.76), (0, crotch * 0.78))
    pieces = [Piece("seam", np.array([(0, 0.04), (0, crotch)]), 0.007, depth=1.1), *double_stitch(fly, look)]
    for s in (1, -1):
        pocket = line((s * waist * 0.55, 0.045), (s * waist * 0.68, 0.105), (s * hip * 0.96, 0.135))
        pieces += [
            Piece("seam", pocket, 0.011, depth=1.4),
            Piece("stitch", pocket + [0, 0.011], 0.0045, colour=look.thread),
        ]
        if look.worn is not None:
            pieces.append(
                Piece(
                    "dot", np.array([(s * waist * 0.58, 0.056), (s * hip * 0.92, 0.125)]), 0.0055, colour=look.button
                )
            )
    return pieces


def _seat(look: Look, waist, hip, crotch) -> list[Piece]:
    """The back between waistband and crotch: yoke, back rise and two patch pockets."""
    yoke = line((-hip * 0.97, 0.095), (0, 0.14), (hip * 0.97, 0.095))
    rise = np.array([(0, 0.045), (0, crotch)])
    pieces = [
        *double_stitch(yoke, look),
        Piece("seam", rise, 0.010, depth=1.5),
        Piece("stitch", rise + [0.008, 0], 0.0045, colour=look.thread),
    ]
    for s in (1, -1):
        c, w, h = np.array([s * hip * 0.5, 0.155]), 0.062, 0.125
        pocket = np.array([(-w, 0), (w, 0), (w * 0.9, h * 0.78), (0, h), (-w * 0.9, h * 0.78)]) + c
        pieces += [
            Piece("panel", pocket, puff=0.5),
            Piece("stitch", pocket[[0, 1]] + [0, 0.012], 0.0045, colour=look.thread),
            Piece(
                "stitch",
                (np.r_[pocket, pocket[:1]] - c - [0, h / 2]) * 0.9 + c + [0, h / 2],
                0.0045,
                colour=look.thread,
            ),
        ]
        if look.worn is not None:
            pieces.append(
                Piece("fade", circle(16) * [w * 0.9, h * 0.55] + c + [0, h * 0.5], 0.02, depth=0.42, colour=look.worn)
            )
    return pieces


def shorts(look: Look) -> list[Piece]:
    return trousers(look, look.vary(0.53, 0.06), 0.125)
