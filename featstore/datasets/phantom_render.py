"""A synthetic chest radiograph: anatomy and findings of known size and place become 8-bit pixels.

Attenuation is summed in a plane (soft tissue, bones, heart, ...), the lungs are air taken out of it, and a tone curve
with noise gives grey values, bright where much is absorbed. Edges are polynomials and noise comes from the raw bits of
a PCG64 stream, all in float64, so that machines agree on the bytes. It resembles a radiograph and is no model of one:
it tests programs, it never ranks a backbone for patients.

Plane: x to the image's right (the patient's left), y down, both -1..1 over the image before the pose is applied. In a
lateral view x points from the patient's front to the back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, UInt8

Plane = Float[np.ndarray, "S S"]
Rows = Float[np.ndarray, "S 1"]
Values = Float[np.ndarray, "..."]
PORTABLE_MAGNIFICATION = 1.08  # of the heart, in an AP exposure


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """What stays with a patient; lengths in plane units."""

    chest: float  # half-width of the rib cage at its widest
    base: float  # y of the right diaphragm's dome
    heart_height: float
    heart_tilt: float
    mediastinum: float  # half-width above the heart
    knob: float  # radius of the aortic knob
    rib_spacing: float
    rib_slope: float
    bone: float  # brightness of bone
    flesh: float  # brightness of soft tissue
    breast: float  # radius, 0 for none
    scoliosis: float
    texture: int  # seed of the vessels' pattern


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """A round place in the frontal plane; `depth` is its x in a lateral view."""

    x: float
    y: float
    radius: float
    depth: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What a study shows. A side is -1 for the patient's right (left in the image) and +1 for the left."""

    heart_ratio: float = 0.44  # heart width / chest width; above 0.5 is cardiomegaly
    effusions: tuple[tuple[int, float], ...] = ()  # side, height of the fluid above the dome
    lesion: Blob | None = None
    consolidations: tuple[Blob, ...] = ()
    pneumothorax: tuple[int, float] | None = None  # side, width of the air rim
    edema: float = 0.0  # haze, 0..1
    atelectases: tuple[tuple[int, float], ...] = ()  # side, height of the plate above the dome
    tube: bool = False  # endotracheal
    line: int = 0  # side of a central venous line, 0 for none
    pacemaker: int = 0  # side of its generator, 0 for none


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """How one exposure was taken. A point (x, y) of the patient lands at scale * (x - lean * y, y) + shift."""

    lean: float = 0.0
    shift_x: float = 0.0
    shift_y: float = 0.0
    scale: float = 1.0
    portable: bool = False  # AP: magnified heart, flat tone curve
    gain: float = 1.0
    noise: float = 0.012  # standard deviation, 1 = full range
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Pixels, the lung fields (diseased parts included, heart and mediastinum not), and the lesion in pixels.

    `lesion` is (column, row, radius); the centre of the top left pixel is (0, 0). `lesion_mask` holds the pixels
    whose centre lies in that disc.
    """

    image: UInt8[np.ndarray, "S S"]
    lungs: Bool[np.ndarray, "S S"]
    lesion: tuple[float, float, float] | None
    lesion_mask: Bool[np.ndarray, "S S"] | None


def ramp(distance: Values, width: float) -> Values:
    """0 below -width, 1 above width, smooth between."""
    t = distance / (2 * width)
    t += 0.5
    np.clip(t, 0.0, 1.0, out=t)
    smooth = -2 * t  # in place from here: most of a rendering's time goes into these two functions
    smooth += 3
    smooth *= t
    smooth *= t
    return smooth


def bump(distance: Values, half_width: float) -> Values:
    """1 at distance 0, 0 from `half_width` on, smooth."""
    t = distance / half_width
    t *= t
    np.subtract(1, t, out=t)
    np.maximum(t, 0.0, out=t)
    t *= t
    return t


def phase(position: Values) -> Values:
    """-0.5..0.5 within each unit of a repeated pattern, 0 in its middle; (x % 1) - 0.5, much faster."""
    within: Values = position - np.floor(position)
    within -= 0.5
    return within


class Film:
    """The patient's coordinates at each pixel of one exposure, and its noise."""

    def __init__(self, pose: Pose, size: int) -> None:
        self.pose, self.size = pose, size
        steps = (np.arange(size) + 0.5) * (2 / size) - 1
        # y needs one column only: a pose shears rows and never turns them, which makes most terms cheap.
        self.y: Rows = (steps[:, None] - pose.shift_y) / pose.scale
        self.column: Float[np.ndarray, "1 S"] = (steps[None, :] - pose.shift_x) / pose.scale
        self.x: Plane = self.column + pose.lean * self.y

    def to_pixels(self, x: float, y: float, radius: float) -> tuple[float, float, float]:
        """Column, row and radius in pixels of a disc in the patient's plane, to a hundredth."""
        pose, half = self.pose, self.size / 2
        column = (pose.scale * (x - pose.lean * y) + pose.shift_x + 1) * half - 0.5
        row = (pose.scale * y + pose.shift_y + 1) * half - 0.5
        return round(column, 2), round(row, 2), round(radius * pose.scale * half, 2)

    def disc(self, column: float, row: float, radius: float) -> Plane:
        """Squared distance from a point over the squared radius, all in pixels: at most 1 inside."""
        steps = np.arange(self.size)
        return ((steps[None, :] - column) ** 2 + (steps[:, None] - row) ** 2) / radius**2

    def near(self, x: float, y: float, radius: float) -> Plane:
        """1 at a place of the patient's plane, 0 from the radius on."""
        squares = (self.x - x) ** 2
        squares += (self.y - y) ** 2
        squares /= -(radius**2)
        squares += 1
        np.maximum(squares, 0.0, out=squares)
        squares *= squares
        return squares

    def grain(self) -> Plane:
        """White noise, mean 0 and standard deviation 1: each pixel sums eight random bytes."""
        raw = np.random.PCG64(self.pose.seed).random_raw(self.size * self.size)
        halves = (raw & 0x00FF00FF00FF00FF) + ((raw >> 8) & 0x00FF00FF00FF00FF)  # four sums of two bytes each
        sums = (halves * 0x0001000100010001) >> 48
        deviation = np.sqrt(8 * (256**2 - 1) / 12)
        noise: Plane = (sums.reshape(self.size, self.size).astype(np.float64) - 8 * 127.5) / deviation
        return noise

    def clouds(self, seed: int, cells: int) -> Plane:
        """Smooth noise in -1..1 that moves with the patient: random values on a coarse grid, interpolated."""
        raw = np.random.PCG64(seed).random_raw((cells + 2) ** 2).astype(np.float64)
        grid = (raw / 2.0**63 - 1).reshape(cells + 2, cells + 2)
        for coordinate in (self.y[:, 0], self.column[0]):
            u = (np.clip(coordinate, -1.0, 0.9999) + 1) * (cells / 2)
            i = u.astype(np.intp)
            t = (u - i)[:, None]
            t = t * t * (3 - 2 * t)
            grid = (grid[i] * (1 - t) + grid[i + 1] * t).T
        return grid


def render_frontal(anatomy: Anatomy, findings: Findings, pose: Pose, size: int = 256) -> Rendering:
    """A frontal view, PA or (with `pose.portable`) AP, which magnifies the heart."""
    film = Film(pose, size)
    x, y = film.x, film.y
    across, left = np.abs(x), x > 0
    cage = _cage(anatomy, y)
    dome = _dome(anatomy, across, left)
    magnified = PORTABLE_MAGNIFICATION if pose.portable else 1.0
    heart = ramp(1 - _heart_radius(anatomy, findings.heart_ratio * magnified, x, y), 0.08)
    spine = x - anatomy.scoliosis * (1 - y * y)

    lungs = _lungs(anatomy, film, cage=cage, dome=dome, heart=heart)
    vessels = _vessels(anatomy, film, across, left)
    aeration = lungs * (0.50 + 0.05 * film.clouds(anatomy.texture, 5) - (0.17 + 0.10 * findings.edema) * vessels)
    aeration = _fill(aeration, findings, film, dome=dome, left=left)
    aeration = _soak(aeration, lungs, findings, anatomy, film, cage=cage, left=left)

    plane = _flesh(anatomy, film, cage) - aeration + 0.05 * heart
    vertebra = 1 + 0.3 * bump(phase(y * 7.5), 0.5)
    plane += 0.10 * bump(spine, 0.085) * vertebra
    plane -= 0.10 * bump(x - 0.4 * anatomy.scoliosis, 0.05) * ramp(-0.22 - y, 0.06)  # trachea
    plane += anatomy.bone * _bones(anatomy, film, cage=cage, spine=spine, lungs=lungs)
    plane -= 0.12 * film.near(0.56 * anatomy.chest, anatomy.base + 0.24, 0.17)  # air in the stomach
    if anatomy.breast:
        squares = (across - 0.40) ** 2 + (y - 0.24) ** 2
        plane += 0.07 * ramp(1 - squares / anatomy.breast**2, 0.10) * ramp(y - 0.15, 0.25)
    lesion = None
    if findings.lesion is not None:
        lesion = film.to_pixels(findings.lesion.x, findings.lesion.y, findings.lesion.radius)
    return _finish(_devices(plane, findings, film), film, lungs, lesion)


def render_lateral(anatomy: Anatomy, findings: Findings, pose: Pose, size: int = 256) -> Rendering:
    """A lateral view, front to the left; fluid pools behind, the heart lies in front, both lungs overlap.

    Pneumothorax, tube and venous line are not drawn: here they show in the frontal view only.
    """
    film = Film(pose, size)
    x, y = film.x, film.y
    front = -0.80 * anatomy.chest + 0.10 * (y + 0.2) ** 2 - 0.14 * ramp(y + 0.2, 0.6) + 0.26 * ramp(-0.40 - y, 0.35)
    spine = x - (0.52 - 0.16 * (y - 0.05) ** 2 - 0.14 * ramp(-0.5 - y, 0.35))
    t = x + 0.20
    dome = anatomy.base - 0.02 + 0.55 * t * t * (t > 0) + 0.20 * t * t * (t <= 0)
    lungs = ramp(x - front, 0.02) * ramp(0.06 - spine, 0.05) * ramp(dome - y, 0.015) * ramp(y + 0.76, 0.08)
    height = anatomy.heart_height * (0.5 + 0.9 * findings.heart_ratio)
    half = anatomy.chest * findings.heart_ratio
    u, v = x - (-0.62 * anatomy.chest + 0.75 * half), y - (anatomy.base - 0.7 * height)
    heart = ramp(1 - ((u + 0.3 * v) / half) ** 2 - (v / height) ** 2, 0.20)

    aeration = lungs * (0.44 + 0.06 * film.clouds(anatomy.texture, 7) + 0.04 * film.clouds(anatomy.texture + 1, 22))
    aeration *= (1 - 0.75 * heart) * (1 - 0.35 * film.near(0.02, -0.08, 0.26)) * (1 - 0.5 * findings.edema)
    for place in findings.consolidations:
        aeration *= 1 - 0.7 * film.near(place.depth, place.y, place.radius * 1.2)
    for _, fluid in findings.effusions:
        level = anatomy.base + 0.20 - fluid - 0.25 * np.clip(x - 0.1, 0.0, 1.0) ** 2
        aeration *= 1 - 0.8 * ramp(y - level, 0.04) * ramp(x - 0.05, 0.15)
    for _, plate in findings.atelectases:
        aeration *= 1 - 0.6 * bump(y - anatomy.base + plate - 0.1 * x, 0.02) * ramp(0.3 - np.abs(x), 0.1)

    back = 0.68 - 0.12 * (y - 0.05) ** 2 - 0.22 * ramp(-0.6 - y, 0.3)
    belly = front - 0.07 - 0.5 * anatomy.breast * bump(y - 0.20, 0.35)
    thick = np.sqrt(np.maximum((x - belly) * (back + 0.06 - x), 0.0)) / (0.5 * (back - belly))
    plane = anatomy.flesh * np.clip(1.15 * thick, 0.0, 1.0) * (1 + 0.10 * ramp(y - anatomy.base, 0.3)) - aeration
    plane += 0.08 * ramp(-0.45 - y, 0.25) * ramp(x + 0.5, 0.2) * (thick > 0)  # raised arms
    discs = phase((y - 0.25 * spine) * 6.5)
    plane += anatomy.bone * (0.9 * bump(spine, 0.10) * (0.55 + 0.45 * ramp(0.40 - np.abs(discs), 0.06)))
    ribs = phase((y - 0.35 * (0.45 - x) - 0.18 * x * x) / anatomy.rib_spacing)
    plane += 0.55 * anatomy.bone * bump(ribs, 0.22) * ramp(x + 0.15, 0.35) * ramp(lungs - 0.5, 0.5)
    plane += 0.8 * anatomy.bone * bump(x - front + 0.015, 0.025) * ramp(y + 0.55, 0.05) * ramp(0.15 - y, 0.1)  # sternum
    lesion = None
    if findings.lesion is not None:
        lesion = film.to_pixels(findings.lesion.depth, findings.lesion.y, findings.lesion.radius)
    if findings.pacemaker:
        plane += 0.30 * _wire(film, ((-0.40, -0.5), (-0.05, -0.45), (-0.02, 0.0), (-0.25, 0.25)), 0.013)
    return _finish(plane, film, lungs, lesion)


def fits_in_lung(anatomy: Anatomy, heart_ratio: float, place: Blob) -> bool:
    """Whether a disc lies within one lung field of a frontal view, portable or not, clear of heart and diaphragm."""
    turn = np.arange(32) * (2 * np.pi / 32)
    x, y = place.x + place.radius * np.cos(turn), place.y + place.radius * np.sin(turn)
    across, sides = np.abs(x), x > 0
    clear = _heart_radius(anatomy, heart_ratio * PORTABLE_MAGNIFICATION, x, y) > 1.1
    outer, inner = _cage(anatomy, y) - across, across - anatomy.mediastinum
    below = _dome(anatomy, across, sides) - y
    same_side = bool(sides.all() or not sides.any())
    return same_side and bool((clear & (outer > 0.03) & (inner > 0.12) & (below > 0.03)).all())


def _cage(anatomy: Anatomy, y: Values) -> Values:
    """Half-width of the rib cage at a height: an egg with its top at -0.80."""
    t = np.clip((0.36 - y) / 1.16, 0.0, 1.0)
    upper = np.sqrt(np.maximum(1 - t * t * np.sqrt(t), 0.0))
    return anatomy.chest * upper * (1 - 0.10 * np.maximum(y - 0.36, 0.0))


def _dome(anatomy: Anatomy, across: Values, left: Bool[np.ndarray, "..."]) -> Values:
    """y of the diaphragm: highest in the middle of each lung, the right dome above the left."""
    t = across / anatomy.chest - 0.48
    return anatomy.base + 0.05 * left + np.where(t > 0, 0.95, 0.35) * t * t


def _heart_radius(anatomy: Anatomy, ratio: float, x: Values, y: Values) -> Values:
    """Squared elliptic radius, 1 on the border; the ellipse is exactly `ratio` times as wide as the chest."""
    half, height = ratio * anatomy.chest, anatomy.heart_height * (0.6 + 0.9 * ratio)
    lean = anatomy.heart_tilt
    stretch = np.sqrt(half**2 - (lean * height) ** 2)
    u = x - 0.32 * half
    v = y - (anatomy.base + 0.06 - 0.86 * height)
    squares: Values = ((u - lean * v) / stretch) ** 2 + (v / height) ** 2
    return squares


def _lungs(anatomy: Anatomy, film: Film, *, cage: Rows, dome: Plane, heart: Plane) -> Plane:
    """Share of air in the field, 0..1: within the cage, above the diaphragm, beside mediastinum and heart."""
    across, y = np.abs(film.x), film.y
    inner = anatomy.mediastinum + 0.10 * ramp(-0.45 - y, 0.25) + 0.05 * ramp(y + 0.15, 0.25)
    knob = film.near(anatomy.mediastinum + 0.02, -0.30, anatomy.knob * 1.6)
    trunk = film.near(anatomy.mediastinum + 0.03, -0.12, 0.15)
    lungs: Plane = ramp(cage - across, 0.012) * ramp(across - inner, 0.03) * ramp(dome - y, 0.012) * (1 - heart)
    lungs *= (1 - 0.9 * ramp(knob - 0.25, 0.15)) * (1 - 0.8 * ramp(trunk - 0.25, 0.2))
    return lungs


def _flesh(anatomy: Anatomy, film: Film, cage: Rows) -> Plane:
    """Chest, shoulders, neck and belly as if without air: thick in the middle, nothing outside the body."""
    y = film.y
    neck = 0.24 + 0.95 * ramp(y + 0.78, 0.24)
    body = np.minimum(neck, 0.16 + np.maximum(cage, 0.80 * anatomy.chest) + 0.55 * ramp(-0.05 - y, 0.50))
    inside = np.maximum(1 - (film.x / body) ** 2, 0.0)
    level = anatomy.flesh * (1 + 0.14 * ramp(y - anatomy.base - 0.05, 0.30) - 0.12 * ramp(-0.70 - y, 0.25))
    flesh: Plane = np.sqrt(inside) * (0.80 + 0.20 * inside) * level
    return flesh


def _vessels(anatomy: Anatomy, film: Film, across: Plane, left: Bool[np.ndarray, "S S"]) -> Plane:
    """Branches that leave the hilum, bend and thin out, and the hilum itself, 0..1."""
    u, v = across - 0.16, film.y + 0.05
    radius = np.sqrt(u * u + v * v)
    bend = film.clouds(anatomy.texture + 1, 8) * (0.5 + 1.6 * radius) + 0.4 * left
    angle = np.arctan2(v, u) / np.pi
    fade = np.maximum(1 - radius / 0.72, 0.0)
    branches = 0.75 * bump(phase(angle * 7 + bend), 0.22) * fade
    twigs = 0.55 * bump(phase(angle * 17 + 1.9 * bend), 0.30) * fade
    patchy = np.maximum(0.55 + 0.75 * film.clouds(anatomy.texture + 2, 26), 0.0)
    return np.minimum(np.maximum(branches, twigs) * patchy + 1.2 * np.maximum(1 - radius / 0.16, 0.0), 1.0)


def _fill(aeration: Plane, findings: Findings, film: Film, *, dome: Plane, left: Bool[np.ndarray, "S S"]) -> Plane:
    """Air displaced by exudate and collapse: haze, patches, plates."""
    across, y = np.abs(film.x), film.y
    if findings.edema:
        squares = ((across - 0.24) / 0.46) ** 2 + ((y - 0.02) / 0.52) ** 2
        wings = np.clip(1.25 - squares, 0.0, 1.0) * (0.75 + 0.35 * film.clouds(film.pose.seed + 3, 14))
        aeration = aeration * (1 - findings.edema * np.clip(wings, 0.0, 1.0))
    for place in findings.consolidations:
        core = film.near(place.x, place.y, place.radius)
        ragged = core + 0.45 * np.sqrt(core) * film.clouds(film.pose.seed + 4, 16)
        aeration = aeration * (1 - 0.80 * ramp(ragged - 0.28, 0.24))
    for side, height in findings.atelectases:
        here = left if side > 0 else ~left
        tilt = y - dome + height - 0.25 * (across - 0.3)
        plate = bump(tilt, 0.024) * ramp(across - 0.16, 0.04) * ramp(0.56 - across, 0.06)
        plate = np.maximum(plate, 0.7 * bump(tilt + 0.08, 0.018) * ramp(across - 0.26, 0.05))
        # A collapsed base also pulls the diaphragm up.
        raised = ramp(y - dome + 0.08, 0.02)
        aeration = aeration * (1 - here * np.maximum(0.85 * plate, raised))
    return aeration


def _soak(
    aeration: Plane,
    lungs: Plane,
    findings: Findings,
    anatomy: Anatomy,
    film: Film,
    *,
    cage: Rows,
    left: Bool[np.ndarray, "S S"],
) -> Plane:
    """Pleural space: fluid that climbs the wall, and free air beside a collapsed lung."""
    across, y = np.abs(film.x), film.y
    for side, height in findings.effusions:
        climb = np.minimum(across / np.maximum(cage, 0.05), 1.0) ** 2
        level = anatomy.base + 0.13 - height - 0.30 * climb * climb * climb  # the meniscus
        aeration = aeration * (1 - 0.94 * ramp(y - level, 0.035) * (left if side > 0 else ~left))
    if findings.pneumothorax is not None:
        side, width = findings.pneumothorax
        here = lungs * (left if side > 0 else ~left)
        # Air rises: the rim is widest at the apex and ends above the base.
        edge = cage - width * (1.15 - 0.95 * ramp(y - 0.02, 0.40)) - 0.6 * width * ramp(-0.45 - y, 0.2)
        rim = ramp(across - edge, 0.010)
        collapsed = aeration * (1 - 0.20 * here) - 0.16 * here * bump(across - edge + 0.006, 0.016)  # with its pleura
        aeration = collapsed + here * rim * (0.60 - collapsed)
    return aeration


def _bones(anatomy: Anatomy, film: Film, *, cage: Rows, spine: Plane, lungs: Plane) -> Plane:
    """Ribs behind and in front, clavicles, shoulders; 1 is the brightness of a rib."""
    x, y = film.x, film.y
    across = np.abs(x)
    t = np.minimum(across / np.maximum(cage, 0.05), 1.2)
    squares = t * t
    inside = ramp(cage + 0.025 - across, 0.02) * (ramp(y + 0.80, 0.06) * ramp(0.72 - y, 0.15))
    back = phase((y - (anatomy.rib_slope + 0.12 * y) * squares + 0.06 * t) / anatomy.rib_spacing)
    shell = 0.70 + 0.45 * squares * squares  # at the wall a rib is seen along its run
    ribs = (bump(back, 0.28) - 0.40 * bump(back, 0.16)) * shell * ramp(np.abs(spine) - 0.05, 0.03)
    front = phase((y - 0.50 * (1 - t)) / (anatomy.rib_spacing * 1.12) + 0.35)
    ribs += 0.50 * bump(front, 0.24) * ramp(t - 0.45, 0.12) * ramp(0.45 - y, 0.2)
    wall = 0.35 * bump(across - cage - 0.012, 0.022)
    collar = y + 0.66 + 0.16 * across - 0.07 * bump(across - 0.30, 0.32)
    clavicles = (bump(collar, 0.036) - 0.3 * bump(collar, 0.02)) * ramp(across - 0.09, 0.02) * ramp(0.80 - across, 0.04)
    heads = 0.8 * ramp(0.75 - ((across - 0.97) ** 2 + (y + 0.62) ** 2) / 0.2**2, 0.5)
    blade = 0.35 * bump(across - 0.68 - 0.10 * (y + 0.2), 0.03) * (ramp(y + 0.62, 0.06) * ramp(0.05 - y, 0.10))
    ribs *= 0.35 + 0.65 * lungs  # little shows through heart and belly
    bones: Plane = (ribs + wall) * inside + clavicles + heads + blade
    return bones


def _devices(plane: Plane, findings: Findings, film: Film) -> Plane:
    """Metal and plastic: thin, sharp and bright."""
    x, y = film.x, film.y
    if findings.tube:
        above = ramp(-0.32 - y, 0.01)
        plane = plane + (0.22 * bump(np.abs(x - 0.005) - 0.02, 0.009) + 0.05 * bump(x - 0.005, 0.02)) * above
    if findings.line:
        s = findings.line
        route: tuple[tuple[float, float], ...] = (
            (s * 0.66, -0.98),
            (s * 0.42, -0.72),
            (s * 0.20, -0.63),
            (-0.11, -0.45),
            (-0.10, -0.05),
        )
        plane = plane + 0.28 * _wire(film, route, 0.011)
    if findings.pacemaker:
        s = findings.pacemaker
        box = ((x - s * 0.50) / 0.105) ** 4 + ((y + 0.47) / 0.085) ** 4
        plane = np.maximum(plane, 1.02 * ramp(1 - box, 0.10))
        route = ((s * 0.45, -0.52), (s * 0.22, -0.60), (-0.09, -0.40), (-0.07, 0.02), (0.05, 0.24), (0.24, 0.30))
        plane = plane + 0.34 * _wire(film, route, 0.013)
    return plane


def _wire(film: Film, points: Sequence[tuple[float, float]], half_width: float) -> Plane:
    """A wire through the points, its corners rounded by cutting them twice, 0..1."""
    for _ in range(2):
        cut = [points[0]]
        for (x0, y0), (x1, y1) in pairwise(points):
            cut += [(0.75 * x0 + 0.25 * x1, 0.75 * y0 + 0.25 * y1), (0.25 * x0 + 0.75 * x1, 0.25 * y0 + 0.75 * y1)]
        points = [*cut, points[-1]]
    nearest = np.full_like(film.x, np.inf)
    for (x0, y0), (x1, y1) in pairwise(points):
        u, v = x1 - x0, y1 - y0
        t = np.clip(((film.x - x0) * u + (film.y - y0) * v) / (u * u + v * v), 0.0, 1.0)
        nearest = np.minimum(nearest, (film.x - x0 - t * u) ** 2 + (film.y - y0 - t * v) ** 2)
    return bump(np.sqrt(nearest), half_width)


def _finish(plane: Plane, film: Film, lungs: Plane, lesion: tuple[float, float, float] | None) -> Rendering:
    """Lesion, tone curve, noise, 8 bits."""
    lesion_mask = None
    if lesion is not None:
        disc = film.disc(*lesion)
        lesion_mask = disc <= 1
        plane = plane + 0.32 * np.sqrt(np.maximum(1 - disc, 0.0))  # the chord through a ball
    pose = film.pose
    dark, contrast = (0.10, 0.80) if pose.portable else (0.03, 1.0)
    value = dark + contrast * np.clip(plane * pose.gain, 0.0, 1.2)
    value = value * (1.35 - 0.40 * value) + pose.noise * film.grain()
    image = np.clip(np.rint(value * 255), 0, 255).astype(np.uint8)
    return Rendering(image=image, lungs=lungs > 0.5, lesion=lesion, lesion_mask=lesion_mask)
