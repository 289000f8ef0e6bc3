"""The rules on machine code: each finds the small piece of code that breaks it, and lets pass the one that keeps it."""

from __future__ import annotations

import pytest

from tarflow_fast.machine_code import lint


def sass(*lines: str) -> lint.Code:
    """Code as cuobjdump prints it, 16 bytes an instruction from address 0 on."""
    text = "\tcode for sm_90\n\t\tFunction : kernel\n"
    text += "".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */\n   /* 0x1 */\n" for i, line in enumerate(lines))
    ((architecture, name, code),) = lint.functions(text)
    assert (architecture, name, len(code)) == (90, "kernel", len(lines))
    return code


def ptx(*lines: str) -> list[lint.Statement]:
    """PTX of one kernel."""
    ((name, code),) = lint.entries(".version 8.7\n.visible .entry k(\n.param .u64 k_param_0\n)\n{\n" + "\n".join(lines))
    assert name == "k"
    return code


def test_code_is_read_as_it_is_printed() -> None:
    text = """
	code for sm_100
		Function : first
	.headerflags	@"EF_CUDA_SM100"
        /*0000*/                   LDC R1, c[0x0][0x37c] ;          /* 0x0000df00ff017b82 */
                                                                    /* 0x000fe20000000800 */
        /*0010*/               @!P0 LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64+0x10] ;  /* 0x0 */
		Function : second
        /*0000*/              @!UP1 BRA.U UP0, 0x0 ;                 /* 0x0 */
"""
    (_, first, code), (architecture, second, other) = lint.functions(text)
    assert (first, second, architecture) == ("first", "second", 100)
    load = code[1]
    assert (load.address, load.predicate, load.name, load.bytes) == (16, "@!P0", "LDG", 16)
    assert load.modifiers == ["E", "128", "STRONG", "GPU"]
    assert (other[0].target, other[0].conditional) == (0, True)


def test_local_memory_is_found() -> None:
    assert "used 2 times, first by STL" in lint.local_memory(sass("STL [R1], R2", "LDL.LU R2, [R1]"))[0]
    assert lint.local_memory(sass("LDS R2, [R1]", "EXIT")) == []


@pytest.mark.parametrize("opcode", ["LDG.E", "LDG.E.128", "LD.E", "LDG.E.EF"])
def test_a_plain_load_is_found(opcode: str) -> None:
    assert len(lint.plain_loads(sass("LDG.E.STRONG.GPU R0, [R2]", f"{opcode} R0, [R2]"))) == 1


def test_loads_past_the_cache_and_of_constants_are_no_plain_loads() -> None:
    assert (
        lint.plain_loads(sass("LDG.E.128.STRONG.GPU R0, [R2]", "LDG.E.CONSTANT R0, [R2]", "LDC R1, c[0x0][0x0]")) == []
    )


BARRIER = (
    "STG.E [R2], R3",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@!PT LDS RZ, [RZ]",
    "MEMBAR.ALL.GPU",
    "ERRBAR",
    "RED.E.ADD.STRONG.GPU [R4], R5",
    "LDG.E.STRONG.GPU R0, [R4]",  # the first look, at 0x60
    "CCTL.IVALL",
    "@P0 BRA 0xf0",
    "CS2R R8, SR_GLOBALTIMERLO",
    "@P1 BRA 0x120",
    "YIELD",
    "LDG.E.STRONG.GPU R0, [R4]",
    "CCTL.IVALL",
    "@!P0 BRA 0x90",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "LDG.E.STRONG.GPU R0, [R2]",
    "EXIT",
    "BPT.TRAP 0x1",
)


def without(lines: tuple[str, ...], *opcodes: str) -> lint.Code:
    """The code with instructions that do nothing in place of these."""
    return sass(*("NOP" if any(opcode in line for opcode in opcodes) else line for line in lines))


def test_a_barrier_that_is_whole() -> None:
    assert lint.grid_barrier(sass(*BARRIER)) == []
    assert lint.watchdog(sass(*BARRIER)) == []


@pytest.mark.parametrize(
    ("lacks", "finding"),
    [
        ("MEMBAR", "signals without a fence before it"),
        ("BAR.SYNC", "signals before all threads of the block have met"),
        ("CCTL", "expected a barrier of the grid, found 1 signals and 0 waits"),
        ("RED", "expected a barrier of the grid, found 0 signals and 2 waits"),
    ],
)
def test_a_barrier_that_lacks_a_part_is_found(lacks: str, finding: str) -> None:
    assert finding in lint.grid_barrier(without(BARRIER, lacks))[0]


def test_memory_that_is_used_before_all_have_met_is_found() -> None:
    late = [*BARRIER[:15], BARRIER[16], BARRIER[15], *BARRIER[17:]]
    assert "is used after CCTL.IVALL at 0x70 before all threads" in lint.grid_barrier(sass(*late))[0]
    early = [BARRIER[1], BARRIER[0], *BARRIER[2:]]
    assert "signals before all threads of the block have met" in lint.grid_barrier(sass(*early))[0]


def test_a_wait_for_a_plain_load_is_found() -> None:
    weak = [line.replace(".STRONG.GPU R0", " R0") for line in BARRIER]
    assert "nothing was waited for before CCTL.IVALL" in lint.grid_barrier(sass(*weak))[0]


def test_a_barrier_of_a_cluster_is_none_of_the_grid() -> None:
    of_cluster = ("MEMBAR.ALL.GPU", "ERRBAR", "UCGABAR_ARV", "UCGABAR_WAIT", "CCTL.IVALL", "LDG.E.STRONG.GPU R0, [R2]")
    assert lint.barrier(sass(*of_cluster)) == []
    assert "expected a barrier of the grid" in lint.grid_barrier(sass(*of_cluster))[0]
    assert lint.barrier(without(of_cluster, "UCGABAR_WAIT"))


@pytest.mark.parametrize("lacks", ["GLOBALTIMER", "TRAP"])
def test_a_wait_without_an_end_is_found(lacks: str) -> None:
    assert "may last for ever" in lint.watchdog(without(BARRIER, lacks))[0]
    assert lint.watchdog(sass("EXIT")) == []


def keys(*order: str, nested: bool = False) -> lint.Code:
    """A loop over keys, with four loads and an exchange of lanes in this order."""
    load = {"load": "LDG.E.128.STRONG.GPU R4, [R2]", "shuffle": "SHFL.BFLY PT, R0, R4, 0x1, 0x1f"}
    lines = [load[each] for each in order]
    more = ["@P1 BRA 0x10"] if nested else []
    return sass("NOP", *lines, *more, "MUFU.EX2 R0, R0", "@P0 BRA 0x0", "EXIT")


def test_loads_that_wait_for_logits_are_found() -> None:
    assert lint.late_loads(keys("load", "load", "load", "load", "shuffle")) == []
    (finding,) = lint.late_loads(keys("load", "shuffle", "load", "load", "load"))
    assert finding.startswith("3 of 4 loads of the loop over keys come after SHFL.BFLY at 0x20, first LDG")


def test_a_kernel_without_a_loop_over_keys_is_found() -> None:
    for code in (
        sass("EXIT"),
        keys("load", "load", "load", "shuffle"),
        keys("load", "load", "load", "load", nested=True),
    ):
        assert lint.late_loads(code) == ["expected a loop over keys, found none"]


def stores(width: str, *places: int, between: str = "NOP") -> lint.Code:
    lines = [f"STS{width} [R4+{hex(place)}], R{8 + i}" for i, place in enumerate(places)]
    return sass(*(each for line in lines for each in (line, between)))


@pytest.mark.parametrize(
    ("width", "places"),
    [("", (0, 4, 8, 12)), ("", (0x2C, 0x20, 0x24, 0x28)), (".64", (16, 24)), (".U16", range(0, 16, 2))],
)
def test_stores_that_one_could_do_are_found(width: str, places: tuple[int, ...]) -> None:
    (finding,) = lint.narrow_stores(stores(width, *places))
    assert finding.startswith(f"{len(places)} stores of {16 // len(places)} bytes, from STS{width} at ")
    assert lint.narrow_stores(stores(width, *places, between="BAR.SYNC 0x0")) == []  # these are not the same values


@pytest.mark.parametrize(
    ("width", "places"), [(".128", (0, 16)), ("", (0, 4, 8)), ("", (4, 8, 12, 16)), ("", (0, 64, 128, 192))]
)
def test_stores_that_lie_apart_are_no_narrow_ones(width: str, places: tuple[int, ...]) -> None:
    assert lint.narrow_stores(stores(width, *places)) == []


DEPENDENT = (
    "LDG.E.STRONG.GPU R0, [R2]",
    "VIMNMX R0, R0, R5, PT",
    "@P0 BRA 0x40",
    "CCTL.E.PF2 [R6]",
    "PREEXIT",
    "ACQBULK",
    "LDG.E.128 R8, [R6]",
    "STG.E.128 [R6], R8",
    "EXIT",
)


def test_a_dependent_launch_that_waits() -> None:
    assert lint.before_wait(sass(*DEPENDENT)) == []


@pytest.mark.parametrize(
    ("early", "finding"),
    [
        ("STG.E [R6], R8", "STG.E at 0x20 comes before the wait"),
        ("LDG.E.128.STRONG.GPU R8, [R6]", "LDG.E.128.STRONG.GPU at 0x20 comes before the wait"),
        ("LDG.E R8, [R6]", "LDG.E at 0x20 comes before the wait"),
        ("LDGSTS.E.BYPASS.128 [R1], [R6]", "LDGSTS.E.BYPASS.128 at 0x20 comes before the wait"),
        ("ATOMG.E.ADD.STRONG.GPU PT, R0, [R6], R1", "ATOMG.E.ADD.STRONG.GPU at 0x20 comes before the wait"),
        ("LDG.E.STRONG.GPU R9, [R6]", "LDG.E.STRONG.GPU at 0x20 is a second load before the wait"),
        ("@P3 EXIT", "EXIT at 0x20 ends a thread that has not waited"),
        ("@P3 BRA 0x60", "goes around"),
        ("BRX R2", "BRX at 0x20 before the wait leads to where nobody can tell"),
    ],
)
def test_what_comes_before_the_wait_is_found(early: str, finding: str) -> None:
    findings = lint.before_wait(sass(*DEPENDENT[:2], early, *DEPENDENT[3:]))
    if finding == "goes around":
        assert findings == [
            "EXIT at 0x80 ends a thread that has not waited",
            "LDG.E.128 at 0x60 comes before the wait for the kernels before this one",
            "STG.E.128 at 0x70 comes before the wait for the kernels before this one",
        ]
    else:
        assert findings[0].startswith(finding)


def test_a_call_before_the_wait_is_followed() -> None:
    call = ("CALL.REL.NOINC 0x90", *DEPENDENT[1:], "NOP", "RET.REL.NODEC R2 0x0")
    assert lint.before_wait(sass(*call)) == []
    (finding,) = lint.before_wait(sass(*call[:9], "STG.E [R6], R8", call[10]))
    assert finding.startswith("STG.E at 0x90 comes before the wait")


def test_a_position_that_is_not_bounded_is_found() -> None:
    assert "is not bounded before the wait" in lint.before_wait(without(DEPENDENT, "VIMNMX"))[0]


def test_a_lesser_of_two_may_be_a_comparison_and_a_choice() -> None:
    compare, choose = "UISETP.LT.AND UP0, UPT, UR10, UR11, UPT", "USEL UR12, UR10, UR11, UP0"
    assert lint.before_wait(sass(DEPENDENT[0], compare, choose, *DEPENDENT[3:])) == []
    other = choose.replace("UR10", "UR9")
    assert "is not bounded" in lint.before_wait(sass(DEPENDENT[0], compare, other, *DEPENDENT[3:]))[0]


def test_a_dependent_launch_that_never_waits_is_found() -> None:
    assert lint.before_wait(without(DEPENDENT, "ACQBULK")) == [
        "expected a wait for the kernels before this one, found none"
    ]


def test_loads_that_the_cache_may_answer_are_found_in_ptx() -> None:
    allowed = ["ld.global.cg.f32 %f1, [%rd1];", "ld.global.nc.v4.u32 {%r1, %r2}, [%rd1];"]
    allowed += ["{", "ld.acquire.gpu.global.u32 %r1, [%rd1];", "}", "ld.shared.f32 %f1, [%r1];"]
    assert lint.weak_loads(ptx(*allowed)) == []
    (finding,) = lint.weak_loads(ptx(*allowed, "@%p1 ld.global.v2.f32 {%f1, %f2}, [%rd1+8];"))
    assert finding.startswith("`ld.global.v2.f32 {%f1, %f2}, [%rd1+8]` may be answered by")
    assert len(lint.weak_loads(ptx("ld.volatile.global.f32 %f1, [%rd1];", "ld.global.ca.f32 %f1, [%rd1];"))) == 1


ARGUMENTS = (
    "ld.param.b64 %rd1, [k_param_0];",
    "ld.param.b64 %rd2, [k_param_1+8];",
    "cvta.to.global.u64 %rd3, %rd1;",
    "mul.wide.s32 %rd4, %r1, 4;",
    "add.s64 %rd5, %rd3, %rd4;",
    "add.s64 %rd6, %rd2, %rd4;",
)


def test_where_an_address_comes_from_is_followed() -> None:
    of = lint.origins(ptx("mov.b64 %rd9, %rd5;", *ARGUMENTS))  # also from further down, as in a loop
    assert of["%rd5"] == of["%rd9"] == {"k_param_0"}
    assert of["%rd6"] == {"k_param_1+8"}
    assert of["%rd4"] == set()


def test_a_constant_that_is_written_is_found() -> None:
    read = "ld.global.nc.f32 %f1, [%rd5];"
    assert lint.written_constants(ptx(*ARGUMENTS, read, "st.global.f32 [%rd6], %f1;")) == []
    (finding,) = lint.written_constants(ptx(*ARGUMENTS, read, "st.global.f32 [%rd3+4], %f1;"))
    assert finding.endswith("reads as a constant what the kernel writes (k_param_0)")


MEETING = (*ARGUMENTS, "st.global.b32 [%rd5], %r1;", "@%p1 atom.global.gpu.acq_rel.add.u32 %r2, [%rd6], %r3;")


def test_parts_of_other_programs_are_read_past_the_cache() -> None:
    assert lint.stale_parts(ptx(*MEETING, "ld.global.cg.b32 { %r4 }, [%rd3];", "ld.global.b32 %r5, [%rd2];")) == []
    (finding,) = lint.stale_parts(ptx(*MEETING, "ld.global.b32 { %r4 }, [ %rd3 + 0 ];"))
    assert "may not see the parts of other programs" in finding
    assert lint.stale_parts(ptx(*ARGUMENTS, "st.global.b32 [%rd5], %r1;", "ld.global.b32 %r4, [%rd3];")) == []
