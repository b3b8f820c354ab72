"""The sewing patterns: what pieces a garment of each kind is made of, front and back, in garment units."""

from dataclasses import dataclass

import numpy as np
from cloth import Piece, circle


@dataclass
class Look:
    """What the pieces of one garment need to know of it."""

    rng: np.random.Generator
    back: bool
    thread: tuple[float, float, float]  # colour of the stitching
    button: tuple[float, float, float]
    worn: tuple[float, float, float] | None = None  # the colour of worn denim; None for cloth that does not fade

    def vary(self, value: float, by: float = 0.08) -> float:
        return value * (1 + self.rng.uniform(-by, by))


def smooth(points, rounds: int = 3, closed: bool = True, keep=()) -> np.ndarray:
    """Rounds the corners of a line by cutting them (Chaikin); the corners with an index in `keep` stay sharp."""
    sharp = {tuple(np.asarray(points[i], float)) for i in keep}
    pts = [np.asarray(p, float) for p in points]
    for _ in range(rounds):
        out = []
        for i, p in enumerate(pts):
            before, after = pts[i - 1], pts[(i + 1) % len(pts)]
            ends = not closed and i in (0, len(pts) - 1)
            out += [p] if ends or tuple(p) in sharp else [0.75 * p + 0.25 * before, 0.75 * p + 0.25 * after]
        pts = out
    return np.array(pts)


def flip(points) -> np.ndarray:
    return np.asarray(points, float) * [-1, 1]


def line(*points) -> np.ndarray:
    return smooth(points, 2, closed=False)


def limb(axis, widths) -> np.ndarray:
    """The outline of a sleeve or leg around its axis (N points) with a width at each."""
    axis, half = np.asarray(axis, float), np.asarray(widths)[:, None] / 2
    along = np.gradient(axis, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True)
    return smooth(np.r_[axis + across * half, (axis - across * half)[::-1]], 2, keep=(0, len(axis) - 1, len(axis), -1))


def hem(a, b, look: Look, inset=(0.0, -0.025)) -> list[Piece]:
    """A sewn hem beside the edge from a to b: a groove with stitches just above it."""
    edge = np.array([a, b], float) + np.asarray(inset)
    return [Piece("seam", edge, 0.006, depth=0.7), Piece("stitch", edge - np.asarray(inset) * 0.25, 0.004, colour=look.thread)]


def double_stitch(points, look: Look, width: float = 0.0045) -> list[Piece]:
    return [Piece("seam", points, 0.008), Piece("stitch", np.asarray(points) + [0, 0.007], width, colour=look.thread)]


def top(look: Look, sleeve: str, neck: str) -> list[Piece]:
    """A t-shirt, sweater, shirt or hoodie without what makes it one: body, sleeves ('short' or 'long') and neck."""
    chest, length = look.vary(0.27), look.vary(0.86 if sleeve == "short" else 0.82, 0.05)
    shoulder, neck_half = np.array([look.vary(0.25, 0.05), 0.055]), look.vary(0.095)
    dip = 0.02 if look.back else {"scoop": look.vary(0.095, 0.2), "crew": look.vary(0.085, 0.1), "collar": 0.08}[neck]
    pieces = []
    for mirrored in (lambda p: np.asarray(p, float), flip):
        pieces += [_map(p, mirrored) for p in _sleeve(look, sleeve, shoulder, chest)]
    inside = smooth([(-neck_half, 0), (neck_half, 0), (neck_half * 0.8, dip + 0.02), (-neck_half * 0.8, dip + 0.02)], 2)
    body_right = [(neck_half, 0), tuple(shoulder), (chest, 0.26), (look.vary(chest, 0.05), 0.55), (look.vary(chest, 0.04), length)]
    outline = [*body_right, *[(-x, y) for x, y in reversed(body_right)], (-neck_half * 0.75, dip * 0.75), (0, dip), (neck_half * 0.75, dip * 0.75)]
    n = len(body_right)
    pieces += [
        Piece("panel", inside, tint=0.62, puff=0.2),
        Piece("panel", smooth(outline, 3, keep=(0, 1, n - 1, n, 2 * n - 2, 2 * n - 1))),
    ]
    rim = line((-neck_half, 0.0), (-neck_half * 0.75, dip * 0.8), (0, dip * 1.02), (neck_half * 0.75, dip * 0.8), (neck_half, 0.0))
    if neck != "collar":
        pieces += [Piece("seam", rim + [0, 0.022], 0.007), Piece("seam", rim + [0, 0.002], 0.006, depth=0.6)]
    for sign in (1, -1):
        arm = line((sign * shoulder[0], 0.055), (sign * shoulder[0] * 0.93, 0.15), (sign * chest, 0.265))
        pieces.append(Piece("seam", arm, 0.007, depth=1.2))
    pieces += hem((-chest * 0.97, length), (chest * 0.97, length), look)
    return pieces


def _map(piece: Piece, mapping) -> Piece:
    mirrored = mapping([[1, 0]])[0, 0] < 0
    return Piece(piece.role, mapping(piece.points), piece.width, -piece.angle if mirrored else piece.angle, piece.tint, piece.puff, piece.depth, piece.colour)


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
            pieces.append(Piece("crease", line(bump + across * 0.06, bump - across * 0.02 + direction * 0.02), 0.018, depth=look.rng.uniform(0.3, 0.8)))
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
    hood = smooth([(-r, 0.06), (-r * 1.05, -0.10), (-r * 0.6, -0.2), (r * 0.6, -0.2), (r * 1.05, -0.10), (r, 0.06), (0, 0.13 if look.back else 0.1)], 3)
    if look.back:
        return [*body, Piece("panel", hood, puff=1.5), Piece("seam", line((0, -0.18), (0.005, 0.09)), 0.007), *_rib(look)]
    opening = smooth([(-r * 0.62, 0.045), (-r * 0.66, -0.07), (-r * 0.35, -0.14), (r * 0.35, -0.14), (r * 0.66, -0.07), (r * 0.62, 0.045), (0, 0.085)], 3)
    pouch = [(-0.115, 0.5), (0.115, 0.5), (0.175, 0.6), (0.175, 0.72), (-0.175, 0.72), (-0.175, 0.6)]
    cords = [Piece("stitch", line((s * 0.045, 0.06), (s * 0.05, 0.16), (s * look.vary(0.045, 0.3), look.vary(0.25))), 0.011, colour=look.button) for s in (1, -1)]
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
        Piece("panel", smooth([(-0.1, 0.01), (0.1, 0.01), (0.1, dip + 0.05), (-0.1, dip + 0.05)], 2), tint=0.62, puff=0.2),
        Piece("panel", smooth(outline, 3, keep=(0, 1, n - 1, n + 1, 2 * n - 1, 2 * n))),
        Piece("seam", line((-waist, 0.42), (0, 0.43), (waist, 0.42)), 0.009, depth=1.4),
    ]
    for x in np.linspace(-0.9, 0.9, 8) + look.rng.uniform(-0.08, 0.08, 8):
        pieces.append(Piece("crease", line((x * waist * 0.8, 0.45), (x * flare * 0.75, 0.7), (x * flare * 0.95, length)), 0.022, depth=look.rng.uniform(0.5, 1.3)))
    pieces += hem((-flare * 0.97, length), (flare * 0.97, length), look)
    if look.back:
        zip_line = np.array([(0, dip + 0.005), (0, 0.56)])
        return [*pieces, Piece("seam", zip_line, 0.012, depth=1.5), Piece("dot", zip_line[:1] + [0, 0.012], 0.009, colour=look.button)]
    return pieces


def skirt(look: Look) -> list[Piece]:
    waist, flare, length = look.vary(0.19), look.vary(0.36, 0.12), look.vary(0.66)
    outline = [(-waist, 0), (waist, 0), (flare * 0.8, length * 0.55), (flare, length), (0, length + 0.035), (-flare, length), (-flare * 0.8, length * 0.55)]
    pieces = [Piece("panel", smooth(outline, 3, keep=(0, 1, 3, 5)))]
    for x in np.linspace(-0.85, 0.85, 7) + look.rng.uniform(-0.07, 0.07, 7):
        pieces.append(Piece("crease", line((x * waist, 0.1), (x * flare * 0.85, 0.4), (x * flare, length)), 0.024, depth=look.rng.uniform(0.4, 1.2)))
    pieces += [Piece("seam", line((-flare * 0.97, length - 0.02), (0, length + 0.012), (flare * 0.97, length - 0.02)), 0.006, depth=0.8)]
    pieces += _waistband(look, waist, loops=False)
    if look.back:
        zip_line = np.array([(0, 0.0), (0, 0.24)])
        slit = np.array([(-0.012, length + 0.05), (0, length - 0.16), (0.012, length + 0.05)])
        return [*pieces, Piece("seam", zip_line, 0.012, depth=1.5), Piece("panel", slit, tint=0.35, puff=0.1)]
    placket = np.array([(0, y) for y in np.arange(0.022, length - 0.04, 0.085)])
    return [*pieces, Piece("seam", np.array([(-0.024, 0.05), (-0.024, length)]), 0.006), Piece("dot", placket, 0.012, colour=look.button)]


def _waistband(look: Look, half: float, loops: bool = True) -> list[Piece]:
    band = np.array([(-half, -0.005), (half, -0.005), (half * 1.03, 0.045), (-half * 1.03, 0.045)])
    pieces = [Piece("panel", band, puff=0.45), *double_stitch(np.array([(-half, 0.045), (half, 0.045)]), look)]
    for x in (-0.75, -0.3, 0.3, 0.75) if loops else ():
        loop = np.array([(-0.008, -0.012), (0.008, -0.012), (0.008, 0.06), (-0.008, 0.06)]) + [x * half, 0]
        pieces.append(Piece("panel", loop, puff=0.3))
    return pieces


def trousers(look: Look, length: float = 1.0, hem_half: float = 0.085) -> list[Piece]:
    """Trousers, or with a short `length` shorts; with `look.worn` denim's fading, rivets and copper thread as well."""
    waist, hip = look.vary(0.180, 0.06), look.vary(0.228, 0.05)
    spread = look.rng.uniform(0.02, 0.10) * length
    crotch, hem_half = look.vary(0.30, 0.04), look.vary(hem_half)
    pieces, knee = [], 0.62 * length
    for mirrored in (flip, lambda p: np.asarray(p, float)):
        foot = np.array([0.120 + spread + look.rng.uniform(-0.01, 0.01), length + look.rng.uniform(-0.008, 0.008)])
        knee_half = hem_half * 0.3 + 0.070
        kx = 0.120 + spread * 0.5
        leg = [(-0.012, 0.02), (waist, 0.0), (hip, 0.2), (hip * 0.99 + spread * 0.3, 0.34), (kx + knee_half, knee), foot + [hem_half, 0], foot + [-hem_half, 0.004], (kx - knee_half, knee), (0.016, crotch + 0.02), (-0.012, crotch - 0.02)]
        hem_at = 5
        if length < 0.7:  # shorts: straight from hip and crotch to the hem, no knee between
            hem_at = 4
            leg[3:5] = [(hip + 0.25 * (foot[0] + hem_half - hip), 0.3)]
            leg[6:7] = []
        pieces.append(Piece("panel", mirrored(smooth(leg, 3, keep=(0, 1, hem_at, hem_at + 1)))))
        pieces += [_map(p, mirrored) for p in _leg_details(look, foot, hem_half, kx, knee, crotch, length)]
    pieces += _seat(look, waist, hip, crotch) if look.back else _fly(look, waist, hip, crotch)
    return pieces + _waistband(look, waist) + ([] if look.back else [Piece("dot", np.array([(0, 0.02)]), 0.012, colour=look.button)])


def _leg_details(look: Look, foot, hem_half, kx, knee, crotch, length) -> list[Piece]:
    rng = look.rng
    pieces = hem(foot + [-hem_half, 0.0], foot + [hem_half, 0.0], look)
    if length > 0.7:
        inseam = line((0.03, crotch + 0.03), (kx - 0.055, knee), tuple(foot + [-hem_half + 0.012, 0]))
        pieces.append(Piece("seam", inseam, 0.005, depth=0.5))
        for k in range(4):
            y = knee + (k - 1.7) * 0.035 + rng.uniform(-0.01, 0.01)
            side = rng.choice([-1, 1])
            pieces.append(Piece("crease", line((kx - side * 0.08, y), (kx, y + 0.012), (kx + side * 0.02, y + 0.03)), 0.016, depth=rng.uniform(0.25, 0.8)))
        for k in range(3):
            y = length - 0.16 + k * 0.035
            pieces.append(Piece("crease", line((foot[0] - 0.06, y), (foot[0] + 0.05, y + rng.uniform(-0.03, 0.03))), 0.014, depth=rng.uniform(0.2, 0.6)))
    for k in range(4):  # creases fan out from the crotch
        a = 0.25 + 0.3 * k + rng.uniform(-0.1, 0.1)
        reach = rng.uniform(0.07, 0.14)
        start = np.array([0.02, crotch + 0.0])
        pieces.append(Piece("crease", line(start, start + reach * np.array([np.cos(a - 0.6), np.sin(a - 0.6)])), 0.016, depth=rng.uniform(0.3, 0.9)))
    if look.worn is not None and length > 0.7:
        top_, x, half = 0.2, kx + 0.01, 0.055
        pieces += [
            Piece("fade", smooth([(x - half * 0.6, top_), (x + half * 0.6, top_), (x + half, 0.45), (x + half * 0.7, knee + 0.1), (x - half * 0.7, knee + 0.1), (x - half, 0.45)], 2), 0.035, depth=0.62, colour=look.worn),
            Piece("fade", circle(16) * [0.05, 0.1] + [x, knee - 0.02], 0.03, depth=0.3, colour=look.worn),
            Piece("fade", limb([foot + [-hem_half, -0.006], foot + [hem_half, -0.006]], (0.02, 0.02)), 0.006, depth=0.55, colour=look.worn),
        ]
    return pieces


def _fly(look: Look, waist, hip, crotch) -> list[Piece]:
    """The front between waistband and crotch: the fly and two curved pockets."""
    fly = line((0.035, 0.045), (0.036, crotch * 0.62), (0.012, crotch * 0.76), (0, crotch * 0.78))
    pieces = [Piece("seam", np.array([(0, 0.04), (0, crotch)]), 0.007, depth=1.1), *double_stitch(fly, look)]
    for s in (1, -1):
        pocket = line((s * waist * 0.55, 0.045), (s * waist * 0.68, 0.105), (s * hip * 0.96, 0.135))
        pieces += [Piece("seam", pocket, 0.011, depth=1.4), Piece("stitch", pocket + [0, 0.011], 0.0045, colour=look.thread)]
        if look.worn is not None:
            pieces.append(Piece("dot", np.array([(s * waist * 0.58, 0.056), (s * hip * 0.92, 0.125)]), 0.0055, colour=look.button))
    return pieces


def _seat(look: Look, waist, hip, crotch) -> list[Piece]:
    """The back between waistband and crotch: yoke, back rise and two patch pockets."""
    yoke = line((-hip * 0.97, 0.095), (0, 0.14), (hip * 0.97, 0.095))
    rise = np.array([(0, 0.045), (0, crotch)])
    pieces = [*double_stitch(yoke, look), Piece("seam", rise, 0.010, depth=1.5), Piece("stitch", rise + [0.008, 0], 0.0045, colour=look.thread)]
    for s in (1, -1):
        c, w, h = np.array([s * hip * 0.5, 0.155]), 0.062, 0.125
        pocket = np.array([(-w, 0), (w, 0), (w * 0.9, h * 0.78), (0, h), (-w * 0.9, h * 0.78)]) + c
        pieces += [
            Piece("panel", pocket, puff=0.5),
            Piece("stitch", pocket[[0, 1]] + [0, 0.012], 0.0045, colour=look.thread),
            Piece("stitch", (np.r_[pocket, pocket[:1]] - c - [0, h / 2]) * 0.9 + c + [0, h / 2], 0.0045, colour=look.thread),
        ]
        if look.worn is not None:
            pieces.append(Piece("fade", circle(16) * [w * 0.9, h * 0.55] + c + [0, h * 0.5], 0.02, depth=0.42, colour=look.worn))
    return pieces


def shorts(look: Look) -> list[Piece]:
    return trousers(look, look.vary(0.53, 0.06), 0.125)


GARMENTS = {
    "t-shirt": t_shirt,
    "shirt": shirt,
    "sweater": sweater,
    "hoodie": hoodie,
    "dress": dress,
    "skirt": skirt,
    "trousers": trousers,
    "shorts": shorts,
    "jeans": trousers,  # only when asked for: the base model has never seen them
}
