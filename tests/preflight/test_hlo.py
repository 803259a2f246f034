"""The cost of small programs that are compiled for 8 CPU devices, and of TPU text, against values worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.preflight import hlo

FLOAT = 4


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def cost(function, *arguments, **options):
    return hlo.analyze(jax.jit(function).lower(*arguments).compile().as_text(), **options)


@pytest.mark.parametrize(
    ("spec", "shapes", "flops"),
    [
        ("MK,KN->MN", ((64, 32), (32, 48)), 2 * 64 * 32 * 48),
        ("BMK,BNK->BMN", ((3, 64, 32), (3, 48, 32)), 2 * 3 * 64 * 32 * 48),
        ("BTHC,HCD->BTD", ((2, 8, 4, 16), (4, 16, 24)), 2 * 2 * 8 * 4 * 16 * 24),
    ],
)
def test_flops_of_a_product(spec, shapes, flops):
    assert cost(functools.partial(jnp.einsum, spec), *[array(*shape) for shape in shapes]).flops == flops


def test_nested_loops_multiply():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    def outer(x, ws):
        return jax.lax.scan(lambda x, w: (inner(x, w), None), x, ws)[0]

    found = cost(outer, array(16, 32), array(3, 32, 32))
    assert found.flops == 3 * 5 * 2 * 16 * 32 * 32


def test_a_gradient_of_rematerialised_layers_has_four_products_for_one():
    """Forward, again for the backward pass, and two of the backward pass: for the input and for the weight."""

    def loss(ws, x):
        layer = jax.checkpoint(lambda x, w: (jnp.sin(x @ w) @ w.T, None))
        return jax.lax.scan(layer, x, ws)[0].sum()

    found = cost(jax.grad(loss), array(6, 64, 32), array(16, 64))
    product = 2 * 16 * 64 * 32
    # The second product of a layer is not needed again: the sum of the next layer's input is all that hangs on it.
    assert found.flops == 6 * product * (4 + 3)


def test_a_loop_may_start_late():
    found = cost(lambda x, w: jax.lax.fori_loop(2, 9, lambda _, x: jnp.tanh(x @ w), x), array(8, 8), array(8, 8))
    assert found.flops == 7 * 2 * 8**3


def test_a_loop_whose_end_only_the_run_knows_takes_the_expected_count():
    def loop(n, x, w):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)

    found = cost(loop, jax.ShapeDtypeStruct((), jnp.int32), array(8, 8), array(8, 8), expected_trips=[6])
    assert found.flops == 6 * 2 * 8**3


def test_expected_counts_are_given_by_depth():
    def inner(n, x, w):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)

    def outer(n, x, w):
        # A loop of a known count between two of unknown ones.
        both = lambda _, x: jax.lax.fori_loop(0, 3, lambda _, x: inner(n, x, w), x)  # noqa: E731
        return jax.lax.fori_loop(0, n, both, x)

    arguments = jax.ShapeDtypeStruct((), jnp.int32), array(8, 8), array(8, 8)
    assert cost(outer, *arguments, expected_trips=[5, 7]).flops == 5 * 3 * 7 * 2 * 8**3
    assert cost(outer, *arguments, expected_trips=[5]).flops == 5 * 3 * 2 * 8**3


def test_a_loop_that_ends_by_its_results_takes_the_expected_count():
    def loop(x, w):
        return jax.lax.while_loop(
            lambda carry: (carry[0] < 32) & (carry[1].sum() > 0), lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)
        )[1]

    assert cost(loop, array(8, 8), array(8, 8), expected_trips=[4]).flops == 4 * 2 * 8**3


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("slow", "fast"))


COLLECTIVES = {
    # Of an array of 1,024 numbers on each device; what a device receives.
    "all-reduce": (lambda x, axis: jax.lax.psum(x, axis), lambda n: 2 * (n - 1) / n * 1024),
    "all-gather": (lambda x, axis: jax.lax.all_gather(x, axis, tiled=True), lambda n: (n - 1) * 1024),
    "reduce-scatter": (lambda x, axis: jax.lax.psum_scatter(x, axis, tiled=True), lambda n: (n - 1) / n * 1024),
    "all-to-all": (lambda x, axis: jax.lax.all_to_all(x, axis, 0, 0, tiled=True), lambda n: (n - 1) / n * 1024),
    "collective-permute": (
        lambda x, axis: jax.lax.ppermute(x, axis, [(i, (i + 1) % jax.lax.axis_size(axis)) for i in range(2)]),
        lambda n: 1024,
    ),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize(("axis", "size", "network"), [("fast", 4, "ICI"), ("slow", 2, "DCN")])
def test_bytes_of_a_collective(mesh, kind, axis, size, network):
    function, numbers = COLLECTIVES[kind]
    mapped = jax.shard_map(lambda x: function(x, axis), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = cost(mapped, array(1024), slices=[0] * 4 + [1] * 4)
    assert found.collectives == (hlo.Collective(kind, network, 1, FLOAT * numbers(size)),)
    assert found.network_bytes(network) == FLOAT * numbers(size)


def test_collectives_in_a_loop(mesh):
    """Weights split over eight devices, gathered layer by layer."""

    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    rows, weights = (NamedSharding(mesh, spec) for spec in (P(("slow", "fast")), P(None, ("slow", "fast"))))
    program = jax.jit(layers, in_shardings=(rows, weights), out_shardings=rows)
    found = hlo.analyze(program.lower(array(4096, 64), array(6, 64, 64)).compile().as_text(), slices=[0] * 8)
    assert found.collectives == (hlo.Collective("all-gather", "ICI", 6, 6 * FLOAT * 64 * 64 * 7 / 8),)
    assert found.flops == 6 * 2 * 4096 / 8 * 64 * 64


def test_bytes_in_memory_of_an_elementwise_program():
    assert cost(lambda x, y: jnp.tanh(x) * y + 1, array(1000), array(1000)).hbm_bytes == 3 * 1000 * FLOAT


def test_a_slice_costs_what_is_sliced():
    found = cost(lambda x, i: jnp.tanh(jax.lax.dynamic_index_in_dim(x, i, keepdims=False)), array(500, 100), 3)
    assert 2 * 100 * FLOAT <= found.hbm_bytes < 4 * 100 * FLOAT


def test_an_update_in_place_costs_what_is_updated():
    update = jax.jit(lambda x, i, y: jax.lax.dynamic_update_index_in_dim(x, jnp.tanh(y), i, 0), donate_argnums=0)
    text = update.lower(array(500, 100), 3, array(100)).compile().as_text()
    assert 2 * 100 * FLOAT <= hlo.analyze(text).hbm_bytes < 4 * 100 * FLOAT


NESTED_TEXT = """HloModule jit_product

%inner (left: f32[64,128]) -> f32[64,128] {
  %left = f32[64,128]{1,0} parameter(0)
  ROOT %same = f32[64,128]{1,0} bitcast(%left)
}

%outer (left: f32[64,128], right: f32[128,8]) -> f32[64,8] {
  %left = f32[64,128]{1,0} parameter(0)
  %right = f32[128,8]{1,0} parameter(1)
  %passed = f32[64,128]{1,0} fusion(%left), kind=kLoop, calls=%inner
  ROOT %product = f32[64,8]{1,0} dot(%passed, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (left: f32[64,128], right: f32[128,8]) -> f32[64,8] {
  %left = f32[64,128]{1,0} parameter(0)
  %right = f32[128,8]{1,0} parameter(1)
  ROOT %result = f32[64,8]{1,0} fusion(%left, %right), kind=kOutput, calls=%outer
}
"""


def test_what_a_fusion_passes_on_to_a_product_is_read():
    assert hlo.analyze(NESTED_TEXT).hbm_bytes == (64 * 128 + 128 * 8 + 64 * 8) * FLOAT


TPU_TEXT = """HloModule jit_step, is_scheduled=true

%condition (state: (s32[], bf16[8,128])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(9)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (state.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %after = token[] after-all()
  %send.1 = (bf16[8,128]{1,0}, u32[], token[]) send(%x, %after), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[8,128]{1,0}, u32[], token[]) recv(%after), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %fetched = ((bf16[8,128]{1,0:T(8,128)(2,1)}), bf16[2,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:128]}
  %fetched.1 = bf16[2,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%fetched)
  %kernel = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%x), custom_call_target="tpu_custom_call"
  %gathered = bf16[16,128]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, use_global_device_ids=true
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%counter.1, %two)
  ROOT %result = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %x)
}

%fused (p.0: f32[2048,2,64,1], p.1: f32[2048,2,7,64]) -> f32[2,2048,2048,7] {
  %p.0 = f32[2048,2,64,1]{2,1,0,3} parameter(0)
  %p.1 = f32[2048,2,7,64]{3,2,1,0} parameter(1)
  ROOT %scores = f32[2,2048,2048,7]{2,1,3,0:T(8,128)} convolution(%p.0, %p.1), window={size=2x7 pad=0_0x6_6 lhs_dilate=2x1 rhs_reversal=0x1}, dim_labels=b0f1_o01i->0bf1
}

%all-reduce-scatter.3 (p.2: f32[64,128]) -> f32[8,128] {
  %p.2 = f32[64,128]{1,0} parameter(0)
  %sum = f32[64,128]{1,0} all-reduce(%p.2), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[8,128]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={8,128}
}

ENTRY %main (a: bf16[8,128], b: f32[64,128]) -> (s32[], bf16[8,128]) {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,128]{1,0} parameter(1)
  %scattered = f32[8,128]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%one)
  %before = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%start, %a)
  ROOT %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%before), condition=%condition, body=%body
}
"""


@pytest.fixture(scope="module")
def tpu():
    return hlo.analyze(TPU_TEXT, slices=[0] * 4 + [1] * 4)


def test_a_loop_on_a_tpu_runs_its_remaining_trips(tpu):
    """Of 9 iterations the first was peeled off, so that the counter starts with a copied 1; the others go two by two."""
    assert tpu.num_kernels == 4


def test_what_passes_between_slices_is_counted_where_it_arrives(tpu):
    num_bytes = 4 * 2 * (1 / 2) * 8 * 128 * 2
    assert hlo.Collective("all-reduce", "DCN", 4, num_bytes) in tpu.collectives


def test_groups_that_are_counted_with_a_transpose(tpu):
    """[4,2]<=[2,4]T(1,0) pairs device i with device i + 4, which is in the other slice."""
    assert hlo.Collective("all-gather", "DCN", 4, 4 * (1 / 2) * 16 * 128 * 2) in tpu.collectives


def test_groups_that_are_axes_of_a_mesh():
    """Axis b of [a=2, b=4] joins devices 0 to 3, which are one slice, or, if these are counted by columns, 0, 2, 4, 6."""
    for groups, network, size in [
        ("mesh['a'=2,'b'=4] {'b'}", "ICI", 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", "DCN", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", "DCN", 8),
    ]:
        text = TPU_TEXT.replace("[4,2]<=[2,4]T(1,0)", groups)
        found = hlo.analyze(text, slices=[0] * 4 + [1] * 4)
        num_bytes = 4 * (size - 1) / size * 16 * 128 * 2
        assert hlo.Collective("all-gather", network, 4, num_bytes) in found.collectives


def test_groups_in_an_unknown_notation_are_refused():
    with pytest.raises(ValueError, match="written in an unknown way"):
        hlo.analyze(TPU_TEXT.replace("[4,2]<=[2,4]T(1,0)", "torus[4,2]"), slices=[0] * 4 + [1] * 4)


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter(tpu):
    assert hlo.Collective("reduce-scatter", "DCN", 1, 7 / 8 * 64 * 128 * FLOAT) in tpu.collectives


def test_what_stays_in_fast_memory_costs_nothing(tpu):
    """The loop's body moves what it gathers and two rows that it fetches; the fusion reads and writes, the counter is copied."""
    gathered, fetched, scattered, counter = (
        4 * (8 + 16) * 128 * 2,
        4 * 2 * 128 * 2,
        (64 + 8) * 128 * FLOAT,
        2 * 4 + 4 * (4 + 4),
    )
    assert tpu.hbm_bytes == gathered + fetched + scattered + counter


def test_batched_products_are_convolutions_on_a_tpu():
    """Scores of 2 kv heads with 7 queries each, 2,048 tokens, width 64: batch and group are spatial dimensions."""
    text = TPU_TEXT.replace("%one = s32[]", SCORES + "%one = s32[]", 1)
    assert hlo.analyze(text).flops == 2 * 2 * 7 * 2048 * 2048 * 64


SCORES = """%q = f32[2048,2,64,1]{2,1,0,3} constant(0)
  %k = f32[2048,2,7,64]{3,2,1,0} constant(0)
  %s = f32[2,2048,2048,7]{2,1,3,0:T(8,128)} fusion(%q, %k), kind=kOutput, calls=%fused
  """


def test_text_of_something_else_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.analyze("HloModule nothing")
