"""Candidate forward kernels for Hopper in Gluon: persistent programs in which one warp only loads.

hopper_statistics_kernel    maxima, sums of exponentials and label logits of one head's tiles
hopper_contrast_kernel      the same of the plain and of the mixed logits, from one accumulator
hopper_exponential_kernel   the first with 2**-o exp(z) stored in hidden's dtype

They leave what statistics_kernel, contrast_kernel and exponential_kernel of the package leave, without bias, softcap
and entropy, so that ``combine`` ends their log-sum-exps. A program has three partitions. One warp fills a ring of
STAGES stages of shared memory by TMA; two warpgroups multiply them, each with HALF rows of a tile of 2 * HALF rows by
WORDS words. Two barriers belong to a stage: ``full`` completes when its bytes have landed, ``empty`` when both
warpgroups have read it.

Why two warpgroups on one tile, and not one tile each (ping-pong): a multiprocessor takes at most 64 bytes a cycle from
L2. With 64 columns of K a tile of 128 x 128 takes 512 cycles of products and 32 KiB, all of these 64 bytes; 64 x 256
takes 40 KiB, 80 a cycle. Two warpgroups on 128 x 256 share the words: 48 KiB in 1,024 cycles, 48 a cycle. They do not
wait for each other, so row work is hidden all the same as far as the ring lets them stand apart: while one is at it,
the other multiplies at the full rate what has landed. What is being loaded and read takes room in the ring; of four
stages of 64 columns that leaves the slower one about one stage behind, of nine of 32 columns about five, which is a
row work's time (hopper_timeline.py). Rows of 64 bytes may cost TMA more than rows of 128: hopper_forward.py times both.

No GPU has run them: kernel_structures.py compiles them offline and tests/test_hopper_forward.py simulates them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E = gl.constexpr(1.4426950408889634)
# As in triton_common.py and triton_contrast.py.
EMPTY_MAX = gl.constexpr(-1.0e30)
SMALLEST_ALPHA = gl.constexpr(2.0**-40)
# Warps beside the first warpgroup and the registers of their threads: the second warpgroup, the loading warp. The first
# warpgroup keeps the rest, 240 as well; the hardware deals them out by warpgroups, (240 + 240 + 24) * 128 < 65,536.
WORKER_WARPS = gl.constexpr([4, 1])
WORKER_REGISTERS = gl.constexpr([240, 24])


@gluon.jit
def make_ring(hidden, weight, STAGES: gl.constexpr):
    """Shared memory of the stages, two halves of hidden's rows in each, and their barriers."""
    rows: gl.constexpr = hidden.block_shape[0]
    words: gl.constexpr = weight.block_shape[0]
    dim: gl.constexpr = weight.block_shape[1]
    hidden_stages = gl.allocate_shared_memory(hidden.dtype, [2 * STAGES, rows, dim], hidden.layout)
    weight_stages = gl.allocate_shared_memory(weight.dtype, [STAGES, words, dim], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    return hidden_stages, weight_stages, full, empty


@gluon.jit
def tile_start(tile, num_rows, num_valid, HALF: gl.constexpr, WORDS: gl.constexpr, GROUP_ROWS: gl.constexpr):
    """First row and word block of a tile: GROUP_ROWS row blocks go through all words together, as in tile_position."""
    num_row_blocks, num_word_blocks = gl.cdiv(num_rows, 2 * HALF), gl.cdiv(num_valid, WORDS)
    per_group = GROUP_ROWS * num_word_blocks
    group = tile // per_group
    size = gl.minimum(num_row_blocks - group * GROUP_ROWS, GROUP_ROWS)
    inside = tile - group * per_group
    return (group * GROUP_ROWS + inside % size) * (2 * HALF), inside // size


@gluon.jit
def load_head(ring, hidden, weight, row_start, word_start, dim, count):
    """Fill stages with one head's part of a tile; ``count`` is how many were filled since the start."""
    hidden_stages, weight_stages, full, empty = ring
    STAGES: gl.constexpr = weight_stages.shape[0]
    HALF: gl.constexpr = hidden_stages.shape[1]
    DIM: gl.constexpr = hidden_stages.shape[2]
    for start in range(0, dim, DIM):
        stage = count % STAGES
        # In the first round every stage is free: the phase before a barrier's first counts as completed.
        mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
        arrived = full.index(stage)
        # Past a matrix's end TMA writes zeros and counts their bytes.
        mbarrier.expect(arrived, 2 * hidden.block_type.nbytes + weight.block_type.nbytes)
        tma.async_copy_global_to_shared(hidden, [row_start, start], arrived, hidden_stages.index(2 * stage))
        tma.async_copy_global_to_shared(hidden, [row_start + HALF, start], arrived, hidden_stages.index(2 * stage + 1))
        tma.async_copy_global_to_shared(weight, [word_start, start], arrived, weight_stages.index(stage))
        count += 1
    return count


@gluon.jit
def add_products(sums, ring, dim, count, WHICH: gl.constexpr):
    """sums + this warpgroup's rows times the words of one head's tile; ``count`` is as in load_head."""
    hidden_stages, weight_stages, full, empty = ring
    STAGES: gl.constexpr = weight_stages.shape[0]
    DIM: gl.constexpr = weight_stages.shape[2]
    for start in range(0, dim, DIM):
        stage = count % STAGES
        mbarrier.wait(full.index(stage), (count // STAGES) & 1)
        words = weight_stages.index(stage).permute((1, 0))
        sums = warpgroup_mma(hidden_stages.index(2 * stage + WHICH), words, sums, is_async=True)
        # These products go on; those of the stage before have been made, and it may be filled again.
        sums = warpgroup_mma_wait(1, deps=[sums])
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=start > 0)
        count += 1
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
    return sums, count


@gluon.jit
def mask_absent(logits, word_start, num_valid, LAYOUT: gl.constexpr):
    """Give words past the end a logit of -inf; only the last block has any."""
    WORDS: gl.constexpr = logits.shape[1]
    if word_start + WORDS > num_valid:
        words = word_start + gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))
        logits = gl.where((words < num_valid)[None, :], logits, float("-inf"))
    return logits


@gluon.jit
def store_label(labels, logits, token_ids, rows, row_mask, word_start, LAYOUT: gl.constexpr):
    """Store the logit of each row's token if this tile holds it."""
    WORDS: gl.constexpr = logits.shape[1]
    column = gl.load(token_ids + rows, mask=row_mask, other=-1).to(gl.int32) - word_start
    inside = row_mask & (column >= 0) & (column < WORDS)
    # Most tiles hold the token of no row, and looking for it in all words is a third of the row work.
    if gl.max(inside.to(gl.int32), axis=0) > 0:
        hit = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))[None, :] == column[:, None]
        gl.store(labels + rows, gl.sum(gl.where(hit, logits, 0.0), axis=1), mask=inside)


@gluon.jit
def store_statistics(maxima, totals, logits, at, row_mask):
    """Store every row's maximum and its sum of exponentials; (EMPTY_MAX, 0) without words."""
    maximum = gl.maximum(gl.max(logits, axis=1), EMPTY_MAX)
    gl.store(maxima + at, maximum, mask=row_mask)
    gl.store(totals + at, gl.sum(gl.exp2((logits - maximum[:, None]) * LOG2_E), axis=1), mask=row_mask)


@gluon.jit
def load_tiles(ring, hidden, weight, sizes, dim, GROUP_ROWS: gl.constexpr):
    """The loading warp where there is one head."""
    num_rows, num_valid = sizes
    HALF: gl.constexpr = hidden.block_shape[0]
    WORDS: gl.constexpr = weight.block_shape[0]
    count = 0
    for tile in range(gl.program_id(0), gl.cdiv(num_rows, 2 * HALF) * gl.cdiv(num_valid, WORDS), gl.num_programs(0)):
        row_start, word_block = tile_start(tile, num_rows, num_valid, HALF, WORDS, GROUP_ROWS)
        count = load_head(ring, hidden, weight, row_start, word_block * WORDS, dim, count)


@gluon.jit
def multiply_statistics(
    ring, token_ids, outputs, sizes, dim, inverse_temperature, WHICH: gl.constexpr, GROUP_ROWS: gl.constexpr
):
    """One warpgroup of hopper_statistics_kernel."""
    maxima, totals, labels = outputs
    num_rows, num_valid = sizes
    HALF: gl.constexpr = ring[0].shape[1]
    WORDS: gl.constexpr = ring[1].shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WORDS, 16])
    num_tiles = gl.cdiv(num_rows, 2 * HALF) * gl.cdiv(num_valid, WORDS)
    count = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_start, word_block = tile_start(tile, num_rows, num_valid, HALF, WORDS, GROUP_ROWS)
        word_start = word_block * WORDS
        rows = row_start + WHICH * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
        row_mask = rows < num_rows
        logits = gl.zeros([HALF, WORDS], gl.float32, layout)
        logits, count = add_products(logits, ring, dim, count, WHICH)
        logits = mask_absent(logits * inverse_temperature, word_start, num_valid, layout)
        store_label(labels, logits, token_ids, rows, row_mask, word_start, layout)
        store_statistics(maxima, totals, logits, gl.cast(word_block, gl.int64) * num_rows + rows, row_mask)


@gluon.jit(do_not_specialize=["num_rows", "num_valid"])
def hopper_statistics_kernel(
    hidden,  # descriptor of [A, D] in blocks of [HALF, DIM]
    weight,  # descriptor of [V, D] in blocks of [WORDS, DIM]
    token_ids,  # [A] int64
    maxima,  # [word blocks, A] fp32 out
    totals,  # [word blocks, A] fp32 out
    labels,  # [A] fp32 out
    num_rows,
    num_valid,
    dim,
    inverse_temperature,
    STAGES: gl.constexpr,
    GROUP_ROWS: gl.constexpr,
):
    """Softmax statistics and label logits of all tiles."""
    ring = make_ring(hidden, weight, STAGES)
    outputs = (maxima, totals, labels)
    sizes = (num_rows, num_valid)
    gl.warp_specialize(
        [
            (multiply_statistics, (ring, token_ids, outputs, sizes, dim, inverse_temperature, 0, GROUP_ROWS)),
            (multiply_statistics, (ring, token_ids, outputs, sizes, dim, inverse_temperature, 1, GROUP_ROWS)),
            (load_tiles, (ring, hidden, weight, sizes, dim, GROUP_ROWS)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )


@gluon.jit
def load_contrast_tiles(ring, hidden_w, weight_w, hidden_l, weight_l, sizes, dims, GROUP_ROWS: gl.constexpr):
    """The loading warp of hopper_contrast_kernel: the plain head's stages of a tile, then the better one's."""
    num_rows, num_valid = sizes
    dim_w, dim_l = dims
    HALF: gl.constexpr = hidden_w.block_shape[0]
    WORDS: gl.constexpr = weight_w.block_shape[0]
    count = 0
    for tile in range(gl.program_id(0), gl.cdiv(num_rows, 2 * HALF) * gl.cdiv(num_valid, WORDS), gl.num_programs(0)):
        row_start, word_block = tile_start(tile, num_rows, num_valid, HALF, WORDS, GROUP_ROWS)
        count = load_head(ring, hidden_l, weight_l, row_start, word_block * WORDS, dim_l, count)
        count = load_head(ring, hidden_w, weight_w, row_start, word_block * WORDS, dim_w, count)


@gluon.jit
def multiply_contrast(
    ring, token_ids, outputs, sizes, dims, mixing, inverse_temperature, WHICH: gl.constexpr, GROUP_ROWS: gl.constexpr
):
    """One warpgroup of hopper_contrast_kernel."""
    maxima, totals, labels = outputs
    num_rows, num_valid = sizes
    dim_w, dim_l = dims
    alphas, alpha_row_stride = mixing
    HALF: gl.constexpr = ring[0].shape[1]
    WORDS: gl.constexpr = ring[1].shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WORDS, 16])
    num_word_blocks = gl.cdiv(num_valid, WORDS)
    num_tiles = gl.cdiv(num_rows, 2 * HALF) * num_word_blocks
    count = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_start, word_block = tile_start(tile, num_rows, num_valid, HALF, WORDS, GROUP_ROWS)
        word_start = word_block * WORDS
        rows = row_start + WHICH * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
        row_mask = rows < num_rows
        at = gl.cast(word_block, gl.int64) * num_rows + rows
        sums = gl.zeros([HALF, WORDS], gl.float32, layout)
        sums, count = add_products(sums, ring, dim_l, count, WHICH)
        # In place, so that one tile is alive: absent words hold garbage later and are masked again.
        sums = mask_absent(sums * inverse_temperature, word_start, num_valid, layout)
        set_size = gl.cast(num_word_blocks, gl.int64) * num_rows
        store_statistics(maxima + set_size, totals + set_size, sums, at, row_mask)
        store_label(labels + num_rows, sums, token_ids, rows, row_mask, word_start, layout)
        alpha = gl.load(alphas + rows * alpha_row_stride, mask=row_mask, other=1.0)
        alpha = gl.where(gl.abs(alpha) < SMALLEST_ALPHA, SMALLEST_ALPHA, alpha)
        sums = sums * ((1.0 - alpha) / (alpha * inverse_temperature))[:, None]
        sums, count = add_products(sums, ring, dim_w, count, WHICH)
        sums = mask_absent(sums * (alpha * inverse_temperature)[:, None], word_start, num_valid, layout)
        store_statistics(maxima, totals, sums, at, row_mask)
        store_label(labels, sums, token_ids, rows, row_mask, word_start, layout)


@gluon.jit(do_not_specialize=["num_rows", "num_valid", "alpha_row_stride"])
def hopper_contrast_kernel(
    hidden_w,  # descriptor of [A, D_w] in blocks of [HALF, DIM]
    weight_w,  # descriptor of [V, D_w] in blocks of [WORDS, DIM]
    hidden_l,  # descriptor of [A, D_l]
    weight_l,  # descriptor of [V, D_l]
    token_ids,  # [A] int64
    alphas,  # [A] or [1] fp32
    maxima,  # [2, word blocks, A] fp32 out: mixed, plain
    totals,  # [2, word blocks, A] fp32 out
    labels,  # [2, A] fp32 out
    num_rows,
    num_valid,
    dim_w,
    dim_l,
    alpha_row_stride,
    inverse_temperature,
    STAGES: gl.constexpr,
    GROUP_ROWS: gl.constexpr,
):
    """Statistics of c and of z_l for all tiles."""
    ring = make_ring(hidden_w, weight_w, STAGES)
    outputs = (maxima, totals, labels)
    sizes, dims = (num_rows, num_valid), (dim_w, dim_l)
    mixing = (alphas, alpha_row_stride)
    gl.warp_specialize(
        [
            (multiply_contrast, (ring, token_ids, outputs, sizes, dims, mixing, inverse_temperature, 0, GROUP_ROWS)),
            (multiply_contrast, (ring, token_ids, outputs, sizes, dims, mixing, inverse_temperature, 1, GROUP_ROWS)),
            (load_contrast_tiles, (ring, hidden_w, weight_w, hidden_l, weight_l, sizes, dims, GROUP_ROWS)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )


@gluon.jit
def store_exponentials(exponentials, staging, values, row_start, word_start, WHICH: gl.constexpr):
    """Store a warpgroup's values, a quarter of the words at a time through two buffers of shared memory."""
    HALF: gl.constexpr = values.shape[0]
    QUARTER: gl.constexpr = values.shape[1] // 4
    halves = gl.split(values.reshape([HALF, 2, 2 * QUARTER]).permute(0, 2, 1))
    for half in gl.static_range(2):
        quarters = gl.split(halves[half].reshape([HALF, 2, QUARTER]).permute(0, 2, 1))
        for quarter in gl.static_range(2):
            buffer = staging.index(2 * WHICH + quarter)
            tma.store_wait(1)  # all but the newest store have read their buffers
            buffer.store(quarters[quarter])
            fence_async_shared()
            word = word_start + (2 * half + quarter) * QUARTER
            tma.async_copy_shared_to_global(exponentials, [row_start, word], buffer)


@gluon.jit
def multiply_exponentials(
    ring, stored, token_ids, outputs, sizes, dim, inverse_temperature, WHICH: gl.constexpr, GROUP_ROWS: gl.constexpr
):
    """One warpgroup of hopper_exponential_kernel."""
    exponentials, staging = stored
    maxima, totals, labels = outputs
    num_rows, num_valid = sizes
    HALF: gl.constexpr = ring[0].shape[1]
    WORDS: gl.constexpr = ring[1].shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WORDS, 16])
    num_tiles = gl.cdiv(num_rows, 2 * HALF) * gl.cdiv(num_valid, WORDS)
    count = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_start, word_block = tile_start(tile, num_rows, num_valid, HALF, WORDS, GROUP_ROWS)
        row_start += WHICH * HALF
        word_start = word_block * WORDS
        rows = row_start + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
        row_mask = rows < num_rows
        logits = gl.zeros([HALF, WORDS], gl.float32, layout)
        logits, count = add_products(logits, ring, dim, count, WHICH)
        logits = mask_absent(logits * inverse_temperature, word_start, num_valid, layout)
        store_label(labels, logits, token_ids, rows, row_mask, word_start, layout)
        at = gl.cast(word_block, gl.int64) * num_rows + rows
        maximum = gl.maximum(gl.max(logits, axis=1), EMPTY_MAX)
        values = gl.exp2((logits - maximum[:, None]) * LOG2_E)
        gl.store(maxima + at, maximum, mask=row_mask)
        gl.store(totals + at, gl.sum(values, axis=1), mask=row_mask)
        # power_offset of triton_rows.py for bf16: multiples of 128.
        offset = gl.where(maximum > EMPTY_MAX, gl.floor(maximum * (LOG2_E / 128) + 0.5) * 128.0, 0.0)
        values = (values * gl.exp2(maximum * LOG2_E - offset)[:, None]).to(exponentials.dtype)
        store_exponentials(exponentials, staging, values, row_start, word_start, WHICH)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "num_valid"])
def hopper_exponential_kernel(
    hidden,  # descriptor of [R, D] in blocks of [HALF, DIM]
    weight,  # descriptor of [V, D] in blocks of [WORDS, DIM]
    token_ids,  # [R] int64
    exponentials,  # descriptor of [R, pitch] in blocks of [HALF, WORDS / 4], out, 0 past num_valid
    maxima,  # [word blocks, R] fp32 out
    totals,  # [word blocks, R] fp32 out
    labels,  # [R] fp32 out
    num_rows,
    num_valid,
    dim,
    inverse_temperature,
    STAGES: gl.constexpr,
    GROUP_ROWS: gl.constexpr,
):
    """Statistics and exponentials of all tiles, bf16."""
    ring = make_ring(hidden, weight, STAGES)
    # Two buffers for each warpgroup.
    shape: gl.constexpr = [4, exponentials.block_shape[0], exponentials.block_shape[1]]
    staging = gl.allocate_shared_memory(exponentials.dtype, shape, exponentials.layout)
    stored = (exponentials, staging)
    outputs = (maxima, totals, labels)
    sizes = (num_rows, num_valid)
    gl.warp_specialize(
        [
            (multiply_exponentials, (ring, stored, token_ids, outputs, sizes, dim, inverse_temperature, 0, GROUP_ROWS)),
            (multiply_exponentials, (ring, stored, token_ids, outputs, sizes, dim, inverse_temperature, 1, GROUP_ROWS)),
            (load_tiles, (ring, hidden, weight, sizes, dim, GROUP_ROWS)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )
