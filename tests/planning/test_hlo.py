"""The compiled program's text, on a program written by hand."""

from jaxdiff.planning.hlo import read

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused.1 (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %inner = bf16[8,4]{1,0} multiply(%p, %p), backend_config={"estimated_cycles":"5000"}
  ROOT %all-gather.2 = bf16[8,4]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8]
}

%body (c: (s32[], f32[16])) -> (s32[], f32[16]) {
  %c = (s32[], f32[16]) parameter(0)
  %work = f32[16]{0} fusion(%c), calls=%fused.3, backend_config={"estimated_cycles":"10"}
  %shift = f32[16]{0} collective-permute(%work), channel_id=9, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[], f32[16]) tuple(%c, %shift)
}

%condition (c: (s32[], f32[16])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%c, %n), direction=LT
}

%endless (c: (s32[], f32[16])) -> pred[] {
  ROOT %less = pred[] custom-call(%c), custom_call_target="Other"
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %start = bf16[8,4]{1,0} fusion(%a), calls=%fused.1, backend_config={"estimated_cycles":"100"}
  %done = bf16[8,4]{1,0} fusion(%start), calls=%fused.1, backend_config={"estimated_cycles":"1"}
  %known = (s32[], f32[16]) while(%t), condition=%endless, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %told = (s32[], f32[16]) while(%t), condition=%condition, body=%body
  %never = (s32[], f32[16]) while(%t), condition=%endless, body=%body
  %ar = f32[6]{0} all-reduce(%x), channel_id=8, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
  %rs = f32[6]{0} reduce-scatter(%x), channel_id=10, replica_groups={{0,1,2},{3,4,5}}
  %splash.6 = (f32[2,3]{1,0}, bf16[4]{0}) custom-call(%a), custom_call_target="tpu_custom_call"
}
"""

STARTS = """\
ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %both = ((bf16[2,4]{1,0:T(8,128)(2,1)}, f32[4]{0}), (bf16[8,4]{1,0:T(8,128)}, \
/*index=1*/f32[16]{0})) all-gather-start(%a, %b), channel_id=1, replica_groups=[1,4]<=[4]
  %one = (f32[2]{0}, f32[8]{0}) all-gather-start(%a), channel_id=2, replica_groups=[1,4]<=[4]
  %sums = (f32[6]{0}, f32[2]{0}) all-reduce-start(%a, %b), channel_id=3, replica_groups=[1,4]<=[4]
  %next = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=4
}
"""


def test_cycles_of_fusions_cover_what_they_call_and_loops_multiply():
    program = read(PROGRAM)
    assert program.cycles == 100 + 1 + 10 * (3 + 6 + 1)
    assert program.unknown_loops == 1


def test_a_collective_in_several_parts_counts_once():
    sent = read(PROGRAM).bytes_sent()
    assert sent["all-gather"] == 8 * 4 * 2 * 3 / 4
    assert sent["all-reduce"] == 2 * 6 * 4 * 7 / 8
    assert sent["reduce-scatter"] == 6 * 4 * 2  # of the whole, three times its result, two thirds


def test_what_starts_together_counts_what_comes_out_of_it():
    sent = read(STARTS).bytes_sent()
    assert sent["all-gather"] == (8 * 4 * 2 + 16 * 4) * 3 / 4 + 32 * 3 / 4
    assert sent["all-reduce"] == 2 * (6 + 2) * 4 * 3 / 4
    assert sent["collective-permute"] == 16 * 4


def test_a_collective_in_a_loop_counts_its_rounds():
    program = read(PROGRAM.replace("  %told", "  %x").replace("%never", "%y"))
    first = next(c for c in program.collectives if c.kind == "collective-permute")
    assert (first.bytes_sent, first.count) == (16 * 4, 3)


def test_kernels_by_name_and_results():
    (kernel,) = read(PROGRAM).kernels
    assert (kernel.name, kernel.results, kernel.operation) == ("splash", ((2, 3), (4,)), "splash.6")
