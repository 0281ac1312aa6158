"""Views on a CPU: compiled code makes each view in one go, from the bytes of its image to normalised values.

The definitions are those of `passes`, which the tests compare it with. A view is made in tiles of a few rows that stay
in the fastest cache. An image is resampled from its bytes, by the taps that are not zero: first the rows and then, in a
tile that is transposed, the columns. So values that share a tap are neighbours in memory, and every loop becomes vector
instructions. Contrast needs the mean gray of the whole view. So the tiles are visited twice, and a third time to blur
the columns. Numba infers the types of the functions and compiles them.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import ceil, exp, floor, log, sqrt
from pickle import UnpicklingError
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from icl_msr.augment.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION
from icl_msr.augment.passes import Parameters
from icl_msr.core.ranks import is_first

_ROWS = 16
"""Rows of a tile."""
_LANES = 3 * _ROWS
_FAINT = 1e-6
"""A blur ends where its Gaussian is less than this share of its peak."""

_TYPES = (
    "void(uint8[:,:,:,::1], int64[:,::1], bool_[::1], bool_, float32[:,::1], int64[:,::1], bool_[::1], float32[::1], "
    "bool_[::1], float32[::1], float32[::1], bool_, float32[:,::1], int64, int64, int64)"
)
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy"}
# Without inlining, a process that compiles may call another version of a part than one that loads what was kept.
_part = njit(forceinline=True, **_OPTIONS)

_ZERO, _THIRD, _ONE, _TWO, _SIX, _WHITE = map(np.float32, (0, 1 / 3, 1, 2, 6, 255))
_TINY = np.float32(1e-12)
_RED, _GREEN, _BLUE = map(np.float32, (0.2989, 0.587, 0.114))


def render(
    images: Tensor, parameters: Parameters, size: int, scale: Tensor, shift: Tensor, memory_format: torch.memory_format
) -> Tensor:
    """Return views as `passes.render` does. The images are uint8, and everything is on the CPU."""
    n, last = len(images), memory_format == torch.channels_last
    out = _aligned(3 * n * size * size).reshape((n, size, size, 3) if last else (n, 3, size, size))
    no = torch.zeros(n, dtype=torch.bool)

    def array(values: Tensor | None, otherwise: Tensor) -> Any:
        return (otherwise if values is None else values).contiguous().numpy()

    work = (
        images.contiguous().numpy(),
        array(parameters.boxes, torch.tensor([[0, 0, *images.shape[2:]]]).expand(n, -1)),
        parameters.flip.numpy(),
        parameters.interpolation == "bicubic",
        array(parameters.factors, torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(n, -1)),
        array(parameters.order, torch.arange(4).expand(n, -1)),
        array(parameters.gray, no),
        array(parameters.sigma, no.float()),
        array(parameters.solarize, no),
        scale.flatten().numpy(),
        shift.flatten().numpy(),
        last,
        out.reshape(n, 3 * size * size),
        size,
    )
    code, threads = _compiled(), min(torch.get_num_threads(), n)
    if threads <= 1:
        code(*work, 0, n)
    else:
        ends = [n * k // threads for k in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda start, end: code(*work, start, end), ends[:-1], ends[1:]))
    views = torch.from_numpy(out)
    return views.permute(0, 3, 1, 2) if last else views


def _aligned(length: int) -> Any:
    """Return room for float32 values that begins at a multiple of 64 bytes, as tensors do.

    Libraries may round a sum in another way at another place. NumPy asks the system for huge pages. With small ones, as
    torch has them, a large batch takes a third longer.
    """
    room = np.empty(length + 15, np.float32)
    start = -room.ctypes.data % 64 // 4
    return room[start : start + length]


@cache
def _compiled() -> Callable[..., None]:
    """Return `_render` as machine code, which is compiled once for a kind of processor and kept on the disk."""
    began = perf_counter()
    try:
        code = njit(_TYPES, cache=True, **_OPTIONS)(_render)
    except (OSError, RuntimeError, EOFError, UnpicklingError):  # it can neither be read nor kept, as on a full disk
        code = njit(_TYPES, **_OPTIONS)(_render)
    if (seconds := perf_counter() - began) > 2 and is_first():
        print(f"The code that makes views was compiled for this machine ({seconds:.0f} s).", flush=True)
    return code


def _render(
    images, boxes, flip, cubic, factors, order, gray, sigma, solarize, scale, shift, last, out, size, start, end
):
    """Make the views start .. end - 1."""
    _, _, height, width = images.shape
    most = 4 * (max(height, width) // size + 1) + 2
    top, left = np.empty(size, np.int64), np.empty(size, np.int64)
    down, across = np.empty((most, size), np.float32), np.empty((most, size), np.float32)
    lines, tile, sums = (
        np.zeros((_LANES, width), np.float32),
        np.empty((width, _LANES), np.float32),
        np.empty((size, _LANES), np.float32),
    )
    halo = 0
    for i in range(start, end):
        halo = max(halo, _radius(sigma[i], size))
    view = np.zeros((3, (size + 2 * halo) * size), np.float32)
    wide = np.zeros((3, _ROWS * (size + 2 * halo)), np.float32)
    blurred = np.empty((3, _ROWS * (size + 2 * halo)), np.float32)
    bell = np.empty(halo + 1, np.float32)
    for i in range(start, end):
        y0, x0, rows, columns = boxes[i]
        row_taps = _taps(y0, rows, size, False, cubic, top, down)
        column_taps = _taps(0, columns, size, flip[i], cubic, left, across)
        turn = 0  # of the contrast, which waits for the mean gray of what the parts before it have made
        while turn < 4 and order[i, turn] != CONTRAST:
            turn += 1
        if factors[i, CONTRAST] == 1:
            turn = 4
        total = 0.0
        for y in range(0, size, _ROWS):
            stop = min(y + _ROWS, size)
            if rows == size and columns == size:
                _convert(images[i], y0, x0, flip[i], y, stop, size, halo, view)
            else:
                _resample(
                    images[i], x0, columns, y, stop, top, down, row_taps, left, across, column_taps, lines, tile, sums
                )
                _spread(sums, y, stop, size, halo, view)
            red, green, blue = _planes(view, (halo + y) * size, (halo + stop) * size)
            if cubic:
                _scale_colours(_ONE, red, green, blue)
            for step in range(turn):
                _change(order[i, step], factors[i, order[i, step]], _ZERO, red, green, blue)
            if turn < 4:
                total += _gray_sum(red, green, blue)
        mean = np.float32(total / (size * size))
        radius = _bell(sigma[i], size, bell)
        for y in range(0, size, _ROWS):
            stop = min(y + _ROWS, size)
            red, green, blue = _planes(view, (halo + y) * size, (halo + stop) * size)
            for step in range(turn, 4):
                _change(order[i, step], factors[i, order[i, step]], mean, red, green, blue)
            if gray[i]:
                _make_gray(red, green, blue)
            if radius > 0:
                _blur_rows(red, green, blue, size, bell, radius, wide, blurred)
            else:
                _write(red, green, blue, solarize[i], scale, shift, last, out[i], y * size, size * size)
        if radius > 0:
            _reflect(view, size, halo, radius)
            for y in range(0, size, _ROWS):
                stop = min(y + _ROWS, size)
                n = (stop - y) * size
                _blur_columns(view, (halo + y) * size, n, size, bell, radius, blurred)
                red, green, blue = _planes(blurred, 0, n)
                _write(red, green, blue, solarize[i], scale, shift, last, out[i], y * size, size * size)


@_part
def _planes(view, start, end):
    return view[0, start:end], view[1, start:end], view[2, start:end]


@_part
def _filter(distance, cubic):
    x = abs(distance)
    if not cubic:
        return max(0.0, 1 - x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((2.5 - 0.5 * x) * x - 4) * x + 2 if x < 2 else 0.0


@_part
def _taps(start, length, size, mirrored, cubic, first, weights):
    """Write the first tap of each of `size` pixels and the weights of all, and return the number of taps."""
    step = length / size
    stretch = max(step, 1.0)
    reach = (2 if cubic else 1) * stretch - 1e-9
    taps = 1
    for p in range(size):
        centre = (p + 0.5) * step - 0.5
        low, high = max(0, ceil(centre - reach)), min(length - 1, floor(centre + reach))
        taps = max(taps, high - low + 1)
    for p in range(size):
        centre = (p + 0.5) * step - 0.5
        low = min(max(0, ceil(centre - reach)), length - taps)
        total = 0.0
        for k in range(taps):
            total += _filter((low + k - centre) / stretch, cubic)
        q = size - 1 - p if mirrored else p
        first[q] = start + low
        for k in range(taps):
            weights[k, q] = _filter((low + k - centre) / stretch, cubic) / total
    return taps


@_part
def _convert(image, y0, x0, mirrored, y, stop, size, halo, view):
    """Write rows of a crop that has the size of the view."""
    for c in range(3):
        for row in range(y, stop):
            line = view[c, (halo + row) * size : (halo + row + 1) * size]
            pixels = image[c, y0 + row, x0 : x0 + size]
            for x in range(size):
                line[x] = np.float32(pixels[x]) / _WHITE
            if mirrored:
                for x in range(size // 2):
                    line[x], line[size - 1 - x] = line[size - 1 - x], line[x]


@_part
def _resample(image, x0, columns, y, stop, top, down, row_taps, left, across, column_taps, lines, tile, sums):
    for c in range(3):
        for row in range(y, stop):
            line = lines[c * _ROWS + row - y]
            pixels = image[c, top[row], x0 : x0 + columns]
            weight = down[0, row] / _WHITE
            for x in range(columns):
                line[x] = weight * np.float32(pixels[x])
            for k in range(1, row_taps):
                pixels = image[c, top[row] + k, x0 : x0 + columns]
                weight = down[k, row] / _WHITE
                for x in range(columns):
                    line[x] += weight * np.float32(pixels[x])
    for x in range(columns):
        for lane in range(_LANES):
            tile[x, lane] = lines[lane, x]
    for x in range(len(sums)):
        weight = across[0, x]
        pixel = tile[left[x]]
        result = sums[x]
        for lane in range(_LANES):
            result[lane] = weight * pixel[lane]
        for k in range(1, column_taps):
            weight = across[k, x]
            pixel = tile[left[x] + k]
            for lane in range(_LANES):
                result[lane] += weight * pixel[lane]


@_part
def _spread(sums, y, stop, size, halo, view):
    for c in range(3):
        for row in range(y, stop):
            line = view[c, (halo + row) * size : (halo + row + 1) * size]
            for x in range(size):
                line[x] = sums[x, c * _ROWS + row - y]


@_part
def _clamp(value):
    return min(max(value, _ZERO), _ONE)


@_part
def _luma(red, green, blue):
    return _RED * red + _GREEN * green + _BLUE * blue


@_part
def _change(operation, factor, mean, red, green, blue):
    if operation == HUE:
        if factor != 0:
            _rotate_hue(factor, red, green, blue)
    elif factor != 1:
        if operation == BRIGHTNESS:
            _scale_colours(factor, red, green, blue)
        elif operation == CONTRAST:
            rest = (_ONE - factor) * mean
            for p in range(len(red)):
                red[p] = _clamp(factor * red[p] + rest)
                green[p] = _clamp(factor * green[p] + rest)
                blue[p] = _clamp(factor * blue[p] + rest)
        elif operation == SATURATION:
            for p in range(len(red)):
                r, g, b = red[p], green[p], blue[p]
                rest = (_ONE - factor) * _luma(r, g, b)
                red[p] = _clamp(factor * r + rest)
                green[p] = _clamp(factor * g + rest)
                blue[p] = _clamp(factor * b + rest)


@_part
def _scale_colours(factor, red, green, blue):
    for p in range(len(red)):
        red[p] = _clamp(factor * red[p])
        green[p] = _clamp(factor * green[p])
        blue[p] = _clamp(factor * blue[p])


@_part
def _gray_sum(red, green, blue):
    total = _ZERO
    for p in range(len(red)):
        total += _luma(red[p], green[p], blue[p])
    return total


@_part
def _shade(turns):
    """Return how much of the chroma a colour lacks."""
    part = turns - np.floor(turns)
    return _clamp(_TWO - _SIX * abs(part - _THIRD))


@_part
def _rotate_hue(shift, red, green, blue):
    for p in range(len(red)):
        r, g, b = red[p], green[p], blue[p]
        value = max(max(r, g), b)
        low = min(min(r, g), b)
        chroma = value - low
        sixths = (g + b - r - low) / max(chroma, _TINY) + _ONE
        turns = (sixths if g >= b else -sixths) / _SIX + shift
        red[p] = value - chroma * _shade(turns + np.float32(11 / 6))
        green[p] = value - chroma * _shade(turns + np.float32(9 / 6))
        blue[p] = value - chroma * _shade(turns + np.float32(7 / 6))


@_part
def _make_gray(red, green, blue):
    for p in range(len(red)):
        gray = _luma(red[p], green[p], blue[p])
        red[p] = gray
        green[p] = gray
        blue[p] = gray


@_part
def _solarize(red, green, blue):
    for p in range(len(red)):
        red[p] = min(red[p], _ONE - red[p])
        green[p] = min(green[p], _ONE - green[p])
        blue[p] = min(blue[p], _ONE - blue[p])


@_part
def _radius(sigma, size):
    return min(floor(sigma * sqrt(-2 * log(_FAINT))), size - 1)


@_part
def _bell(sigma, size, bell):
    """Write one half of a Gaussian, from its peak on, and return its radius in pixels."""
    radius = _radius(sigma, size)
    total = 1.0
    for k in range(1, radius + 1):
        total += 2 * exp(-0.5 * (k / sigma) ** 2)
    bell[0] = 1 / total
    for k in range(1, radius + 1):
        bell[k] = exp(-0.5 * (k / sigma) ** 2) / total
    return radius


@_part
def _blur_line(line, n, step, offset, bell, radius, result):
    """Blur the values offset .. offset + n - 1 of a line, whose neighbours are `step` apart."""
    weight, values = bell[0], line[offset : offset + n]
    for p in range(n):
        result[p] = weight * values[p]
    for k in range(1, radius + 1):
        weight = bell[k]
        before = line[offset - k * step : offset - k * step + n]
        after = line[offset + k * step : offset + k * step + n]
        for p in range(n):
            result[p] += weight * (before[p] + after[p])


@_part
def _blur_rows(red, green, blue, size, bell, radius, wide, blurred):
    pitch = size + 2 * radius
    rows = len(red) // size
    for c, plane in enumerate((red, green, blue)):
        for y in range(rows):
            line = wide[c, y * pitch : (y + 1) * pitch]
            _copy(plane[y * size : (y + 1) * size], line[radius : radius + size])
            for k in range(1, radius + 1):
                line[radius - k] = line[radius + k]
                line[radius + size - 1 + k] = line[radius + size - 1 - k]
        _blur_line(wide[c], rows * pitch - 2 * radius, 1, radius, bell, radius, blurred[c])
        for y in range(rows):
            _copy(blurred[c, y * pitch : y * pitch + size], plane[y * size : (y + 1) * size])


@_part
def _copy(values, to):
    for p in range(len(values)):
        to[p] = values[p]


@_part
def _reflect(view, size, halo, radius):
    last = halo + size - 1
    for c in range(3):
        for k in range(1, radius + 1):
            for source, target in ((halo + k, halo - k), (last - k, last + k)):
                _copy(view[c, source * size : (source + 1) * size], view[c, target * size : (target + 1) * size])


@_part
def _blur_columns(view, offset, n, size, bell, radius, blurred):
    for c in range(3):
        _blur_line(view[c], n, size, offset, bell, radius, blurred[c])


@_part
def _write(red, green, blue, solarized, scale, shift, last, out, offset, area):
    if solarized:
        _solarize(red, green, blue)
    if last:
        line = out[3 * offset : 3 * (offset + len(red))]
        for p in range(len(red)):
            line[3 * p] = red[p] * scale[0] + shift[0]
            line[3 * p + 1] = green[p] * scale[1] + shift[1]
            line[3 * p + 2] = blue[p] * scale[2] + shift[2]
    else:
        for c, plane in enumerate((red, green, blue)):
            factor, term = scale[c], shift[c]
            line = out[c * area + offset : c * area + offset + len(plane)]
            for p in range(len(plane)):
                line[p] = plane[p] * factor + term
