"""Sewing patterns of tops and dresses: t-shirt, shirt, sweater, hoodie and dress, front and back."""

import numpy as np

from cloth import Piece
from sewing import Look, flip, hem, limb, line, mapped, smooth


def top(look: Look, sleeve: str, neck: str) -> list[Piece]:
    """What t-shirt, sweater, shirt and hoodie share: body, sleeves (short, long) and neck (scoop, crew, collar)."""
    chest, length = look.vary(0.27), look.vary(0.86 if sleeve == "short" else 0.82, 0.05)
    shoulder, neck_half = np.array([look.vary(0.25, 0.05), 0.055]), look.vary(0.095)
    front_dip = {"scoop": look.vary(0.095, 0.2), "crew": look.vary(0.085, 0.1), "collar": 0.08}[neck]
    dip = 0.02 if look.back else front_dip
    pieces = []
    for mirrored in (lambda p: np.asarray(p, float), flip):
        pieces += [mapped(p, mirrored) for p in _sleeve(look, sleeve, shoulder, chest)]
    inside = smooth(
        [(-neck_half, 0), (neck_half, 0), (neck_half * 0.8, dip + 0.02), (-neck_half * 0.8, dip + 0.02)], 2
    )
    body_right = [
        (neck_half, 0),
        tuple(shoulder),
        (chest, 0.26),
        (look.vary(chest, 0.05), 0.55),
        (look.vary(chest, 0.04), length),
    ]
    outline = [
        *body_right,
        *[(-x, y) for x, y in reversed(body_right)],
        (-neck_half * 0.75, dip * 0.75),
        (0, dip),
        (neck_half * 0.75, dip * 0.75),
    ]
    n = len(body_right)
    pieces += [
        Piece("panel", inside, tint=0.62, puff=0.2),
        Piece("panel", smooth(outline, 3, keep=(0, 1, n - 1, n, 2 * n - 2, 2 * n - 1))),
    ]
    rim = line(
        (-neck_half, 0.0),
        (-neck_half * 0.75, dip * 0.8),
        (0, dip * 1.02),
        (neck_half * 0.75, dip * 0.8),
        (neck_half, 0.0),
    )
    if neck != "collar":
        pieces += [Piece("seam", rim + [0, 0.022], 0.007), Piece("seam", rim + [0, 0.002], 0.006, depth=0.6)]
    for sign in (1, -1):
        arm = line((sign * shoulder[0], 0.055), (sign * shoulder[0] * 0.93, 0.15), (sign * chest, 0.265))
        pieces.append(Piece("seam", arm, 0.007, depth=1.2))
    pieces += hem((-chest * 0.97, length), (chest * 0.97, length), look)
    return pieces


def _sleeve(look: Look, kind: str, shoulder: np.ndarray, chest: float) -> list[Piece]:
    spread = look.rng.uniform(0.30, 0.62) if kind == "long" else look.rng.uniform(0.75, 1.0)
    length = look.vary(0.66, 0.06) if kind == "long" else look.vary(0.27)
    direction = np.array([np.sin(spread), np.cos(spread)])
    across = np.array([direction[1], -direction[0]])
    start = shoulder - across * 0.1025  # the sleeve's upper edge begins at the shoulder's tip
    bend = look.rng.uniform(-0.03, 0.03) * across
    axis = np.array([start, start + direction * length * 0.5 + bend, start + direction * length])
    widths = (0.205, 0.155, 0.105) if kind == "long" else (0.205, 0.19, 0.175)
    end = axis[-1] - direction * (0.055 if kind == "long" else 0.03)
    cuff = np.array([end + across * widths[-1] * 0.5, end - across * widths[-1] * 0.5])
    pieces = [Piece("panel", limb(axis, widths), angle=-spread), Piece("seam", cuff, 0.007, depth=0.9)]
    if kind == "long":
        mid = axis[1]
        for k in (-0.035, 0.0, 0.04):
            bump = mid + direction * (k + look.rng.uniform(-0.012, 0.012))
            pieces.append(
                Piece(
                    "crease",
                    line(bump + across * 0.06, bump - across * 0.02 + direction * 0.02),
                    0.018,
                    depth=look.rng.uniform(0.3, 0.8),
                )
            )
    return pieces


def t_shirt(look: Look) -> list[Piece]:
    pieces = top(look, "short", "scoop")
    if look.back:
        pieces.append(Piece("seam", line((-0.23, 0.075), (0, 0.085), (0.23, 0.075)), 0.006, depth=0.9))
    return pieces


def sweater(look: Look) -> list[Piece]:
    pieces = top(look, "long", "crew")
    bottom = max(p.points[:, 1].max() for p in pieces if p.role == "panel" and abs(p.points[:, 0].mean()) < 0.02)
    for x in np.arange(-0.25, 0.251, 0.022):  # the ribbed waistband
        pieces.append(Piece("seam", np.array([(x, bottom - 0.07), (x, bottom - 0.004)]), 0.004, depth=0.55))
    pieces.append(Piece("seam", np.array([(-0.265, bottom - 0.075), (0.265, bottom - 0.075)]), 0.008))
    if look.back:
        pieces += [
            Piece("seam", np.array([(-0.03, 0.045), (0, 0.09), (0.03, 0.045)]), 0.008, depth=1.3),
            Piece("seam", line((-0.25, 0.12), (0, 0.14), (0.25, 0.12)), 0.008, depth=1.2),
        ]
    return pieces


def hoodie(look: Look) -> list[Piece]:
    body = top(look, "long", "crew")
    r = look.vary(0.15, 0.06)
    hood = smooth(
        [
            (-r, 0.06),
            (-r * 1.05, -0.10),
            (-r * 0.6, -0.2),
            (r * 0.6, -0.2),
            (r * 1.05, -0.10),
            (r, 0.06),
            (0, 0.13 if look.back else 0.1),
        ],
        3,
    )
    if look.back:
        return [
            *body,
            Piece("panel", hood, puff=1.5),
            Piece("seam", line((0, -0.18), (0.005, 0.09)), 0.007),
            *_rib(look),
        ]
    opening = smooth(
        [
            (-r * 0.62, 0.045),
            (-r * 0.66, -0.07),
            (-r * 0.35, -0.14),
            (r * 0.35, -0.14),
            (r * 0.66, -0.07),
            (r * 0.62, 0.045),
            (0, 0.085),
        ],
        3,
    )
    pouch = [(-0.115, 0.5), (0.115, 0.5), (0.175, 0.6), (0.175, 0.72), (-0.175, 0.72), (-0.175, 0.6)]
    cords = [
        Piece(
            "stitch",
            line((s * 0.045, 0.06), (s * 0.05, 0.16), (s * look.vary(0.045, 0.3), look.vary(0.25))),
            0.011,
            colour=look.button,
        )
        for s in (1, -1)
    ]
    cords += [Piece("seam", c.points, 0.016, depth=0.6) for c in cords]
    return [
        *body,
        Piece("panel", hood, puff=1.4),
        Piece("panel", opening, tint=0.5, puff=0.1),
        Piece("panel", np.array(pouch), puff=0.55),
        *cords,
        *_rib(look),
    ]


def _rib(look: Look) -> list[Piece]:
    return [Piece("seam", np.array([(-0.26, 0.75), (0.26, 0.75)]), 0.008)]


def shirt(look: Look) -> list[Piece]:
    pieces = top(look, "long", "collar")
    if look.back:
        yoke = line((-0.25, 0.15), (0, 0.165), (0.25, 0.15))
        pleat = [Piece("crease", np.array([(x, 0.17), (x * 1.3, 0.5)]), 0.012, depth=0.8) for x in (-0.02, 0.02)]
        collar = smooth([(-0.1, -0.015), (0.1, -0.015), (0.115, 0.05), (0, 0.06), (-0.115, 0.05)], 2, keep=(0, 1))
        return [*pieces, Piece("seam", yoke, 0.008, depth=1.3), *pleat, Piece("panel", collar, puff=0.8)]
    for s in (1, -1):
        leaf = np.array([(s * 0.085, -0.025), (s * 0.125, 0.055), (s * 0.085, 0.135), (s * 0.005, 0.07)])
        pieces.append(Piece("panel", leaf, puff=0.8))
    pieces += [Piece("seam", np.array([(x, 0.08), (x, 0.8)]), 0.006, depth=1.1) for x in (-0.022, 0.022)]
    pieces.append(Piece("dot", np.array([(0, y) for y in np.arange(0.12, 0.78, 0.095)]), 0.0095, colour=look.button))
    pocket = np.array([(0.075, 0.23), (0.19, 0.23), (0.19, 0.33), (0.1325, 0.355), (0.075, 0.33)])
    return [*pieces, Piece("panel", pocket, puff=0.35), Piece("seam", pocket[:2] + [0, 0.02], 0.005)]


def dress(look: Look) -> list[Piece]:
    waist, flare, length = look.vary(0.16), look.vary(0.33, 0.15), look.vary(0.98, 0.06)
    dip = 0.05 if look.back else 0.15
    strap = [(0.085, 0.0), (0.135, 0.0), (0.15, 0.1), (0.19, 0.2)]
    right = [*strap, (waist, 0.42), (flare * 0.8, 0.72), (flare, length)]
    left = [(-x, y) for x, y in reversed(right)]
    outline = [*right, (0, length + 0.02), *left, (-0.07, dip * 0.8), (0, dip), (0.07, dip * 0.8)]
    n = len(right)
    pieces = [
        Piece(
            "panel", smooth([(-0.1, 0.01), (0.1, 0.01), (0.1, dip + 0.05), (-0.1, dip + 0.05)], 2), tint=0.62, puff=0.2
        ),
        Piece("panel", smooth(outline, 3, keep=(0, 1, n - 1, n + 1, 2 * n - 1, 2 * n))),
        Piece("seam", line((-waist, 0.42), (0, 0.43), (waist, 0.42)), 0.009, depth=1.4),
    ]
    for x in np.linspace(-0.9, 0.9, 8) + look.rng.uniform(-0.08, 0.08, 8):
        pieces.append(
            Piece(
                "crease",
                line((x * waist * 0.8, 0.45), (x * flare * 0.75, 0.7), (x * flare * 0.95, length)),
                0.022,
                depth=look.rng.uniform(0.5, 1.3),
            )
        )
    pieces += hem((-flare * 0.97, length), (flare * 0.97, length), look)
    if look.back:
        zip_line = np.array([(0, dip + 0.005), (0, 0.56)])
        return [
            *pieces,
            Piece("seam", zip_line, 0.012, depth=1.5),
            Piece("dot", zip_line[:1] + [0, 0.012], 0.009, colour=look.button),
        ]
    return pieces
