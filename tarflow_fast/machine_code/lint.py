"""Rules on the machine code of GPU kernels: what may be read when, and by which instructions.

No GPU is needed for them, and no test on one would show what they do: a load that goes past a barrier gives a wrong
result once in a million runs, and loads that wait for each other give the right one late.

A rule is a function of the code of one kernel that returns its findings, a sentence each, or none. SASS is read as
`cuobjdump -sass` prints it, and PTX as compilers write it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

LOADS = {"LDG", "LD", "LDGSTS"}  # of global memory
UPDATES = {"RED", "REDG", "ATOM", "ATOMG"}
STORES = {"STG", "ST", *UPDATES}
BULK = {"UBLKCP", "UTMALDG", "UTMASTG", "UTMAREDG"}
NEAR = 200  # instructions around a signal or a wait that are looked at
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # of an access, where they are not 4


@dataclass(frozen=True)
class Instruction:
    """One instruction of SASS. predicate: "@P0", "@!P0" or nothing."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @cached_property
    def name(self) -> str:
        """Returns the opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @cached_property
    def modifiers(self) -> list[str]:
        """Returns the opcode's modifiers."""
        return self.opcode.split(".")[1:]

    @property
    def never(self) -> bool:
        """Returns whether this is an instruction that does nothing, as compilers put before a fence."""
        return self.predicate == "@!PT"

    @property
    def bytes(self) -> int:
        """Returns the bytes that each thread reads or writes."""
        return next((BYTES[each] for each in self.modifiers if each in BYTES), 4)

    @property
    def target(self) -> int | None:
        """Returns where a branch or call leads, or None."""
        if self.name not in ("BRA", "CALL", "JMP"):
            return None
        found = re.search(r"(0x[0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """Returns whether a branch may fall through."""
        return bool(self.predicate) or "," in self.operands

    def __str__(self) -> str:
        return f"{self.opcode} at {self.address:#x}"


Code = list[Instruction]
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*);")


def functions(sass: str) -> Iterator[tuple[int, str, Code]]:
    """Yields the architecture, name and code of each kernel in what `cuobjdump -sass` printed."""
    architecture, name = 0, ""
    code: Code = []
    for line in sass.splitlines():
        if found := re.match(r"\s*code for sm_(\d+)", line):
            if code:
                yield architecture, name, code
            architecture, code = int(found[1]), []
        elif found := re.match(r"\s*Function : (\S+)", line):
            if code:
                yield architecture, name, code
            name, code = found[1], []
        elif found := _INSTRUCTION.match(line):
            code.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4].strip()))
    if code:
        yield architecture, name, code


def local_memory(code: Code) -> list[str]:
    """Finds registers that are kept in memory, and arrays that are indexed at run time."""
    found = [each for each in code if each.name in ("LDL", "STL")]
    return [f"local memory is used {len(found)} times, first by {found[0]}"] if found else []


def plain_loads(code: Code) -> list[str]:
    """Finds loads that a multiprocessor's own cache may answer, which does not see what other blocks have written.

    Allowed are STRONG ones, which go past it, and CONSTANT ones, of memory that nobody writes during the launch.
    """
    found = [each for each in code if each.name in ("LDG", "LD") and not {"STRONG", "CONSTANT"} & set(each.modifiers)]
    return [f"{each} may read what this multiprocessor had read before" for each in found]


def barrier(code: Code) -> list[str]:
    """Finds what a barrier of the grid lacks.

    All threads of a block meet before one of them signals, with a fence of the whole device in between. A wait ends
    with the multiprocessor's own cache made invalid, and all threads meet before any of them goes on.
    """
    findings = []
    waits = [i for i, each in enumerate(code) if _ends_wait(code, i)]
    polls = {id(_polled(code, i)) for i in waits}
    for i, each in enumerate(code):
        if each.name in UPDATES and "GPU" in each.modifiers:
            before = [c for c in code[max(i - NEAR, 0) : i][::-1] if not c.never]
            if _first(before, {"MEMBAR"}, LOADS | STORES) is None:
                findings.append(f"{each} signals without a fence before it")
            elif _first(before, {"BAR"}, STORES) is None:
                findings.append(f"{each} signals before all threads of the block have met")
        if i in waits:
            after = [c for c in code[i + 1 : i + NEAR] if id(c) not in polls]
            if _first(after, {"BAR"}, LOADS | STORES) is None:
                findings.append(f"memory is used after {each} before all threads of the block have met")
            polled = _polled(code, i)
            if polled is None or "STRONG" not in polled.modifiers:
                findings.append(f"nothing was waited for before {each}")
    return findings


def _ends_wait(code: Code, i: int) -> bool:
    """Returns whether instruction i ends a wait of a barrier of the grid: that of a cluster is the hardware's own."""
    return code[i].opcode == "CCTL.IVALL" and not any(each.name == "UCGABAR_WAIT" for each in code[max(i - 3, 0) : i])


def _polled(code: Code, i: int) -> Instruction | None:
    """Returns what the wait that ends with instruction i was for: a load, or an atomic update, just before it."""
    return _first(code[max(i - NEAR, 0) : i][::-1], LOADS | UPDATES, STORES - UPDATES)


def _first(code: Iterable[Instruction], wanted: set[str], unwanted: set[str]) -> Instruction | None:
    """Returns the first instruction of such a name, or None if one of the unwanted comes before it."""
    for each in code:
        if each.name in wanted:
            return each
        if each.name in unwanted:
            return None
    return None


def grid_barrier(code: Code) -> list[str]:
    """Finds what the barriers of a kernel with a grid's barrier lack, or that there are none."""
    signals = [each for each in code if each.name in UPDATES]
    waits = [each for i, each in enumerate(code) if _ends_wait(code, i)]
    if not signals or not waits:
        return [f"expected a barrier of the grid, found {len(signals)} signals and {len(waits)} waits"]
    return barrier(code)


def watchdog(code: Code) -> list[str]:
    """Finds a wait that nothing would end if its signal never came: one without a clock and a trap."""
    if not any(each.opcode == "CCTL.IVALL" for each in code):
        return []
    clock = any("SR_GLOBALTIMER" in each.operands for each in code)
    trap = any(each.opcode == "BPT.TRAP" for each in code)
    return [] if clock and trap else ["a wait for other blocks may last for ever: there is no clock with a trap"]


def loops(code: Code) -> Iterator[tuple[int, int]]:
    """Yields the first and last index of each loop: where a branch leads back to, and that branch."""
    index = {each.address: i for i, each in enumerate(code)}
    for i, each in enumerate(code):
        if each.name == "BRA" and each.target is not None and index.get(each.target, i + 1) <= i:
            yield index[each.target], i


def key_loops(code: Code) -> list[Code]:
    """Returns the loops of an attention over cached keys: they load by themselves, exchange lanes, and exponentiate."""
    spans = sorted(set(loops(code)))
    loads = [i for i, each in enumerate(code) if each.name == "LDG" and "STRONG" in each.modifiers]
    found = []
    for first, last in spans:
        inside = [i for i in loads if first <= i <= last]
        inner = [(a, b) for a, b in spans if (a, b) != (first, last) and first <= a and b <= last]
        if len(inside) < 4 or any(a <= i <= b for i in inside for a, b in inner):
            continue
        body = code[first : last + 1]
        if {"SHFL", "MUFU.EX2"} <= {each.name for each in body} | {each.opcode for each in body}:
            found.append(body)
    return found


def late_loads(code: Code) -> list[str]:
    """Finds loads of keys and values that wait for the logits of the keys before them.

    All loads of a turn of the loop are to be under way before lanes are exchanged for the first time.
    """
    bodies = key_loops(code)
    findings = []
    for body in bodies:
        exchanged = next(i for i, each in enumerate(body) if each.name == "SHFL")
        late = [each for each in body[exchanged:] if each.name == "LDG"]
        if late:
            findings.append(
                f"{len(late)} of {sum(each.name == 'LDG' for each in body)} loads of the loop over keys come after "
                f"{body[exchanged]}, first {late[0]}"
            )
    return findings if bodies else ["expected a loop over keys, found none"]


_ADDRESS = re.compile(r"\[(\w+)(?:\.\w+)*(?:\+(U?R\w+))?(?:\+(-?0x[0-9a-f]+))?\]")


def narrow_stores(code: Code) -> list[str]:
    """Finds stores to shared memory next to each other, within 16 bytes that one store could have written."""
    findings: list[str] = []
    run: dict[tuple[str, str], dict[int, Instruction]] = defaultdict(dict)
    for each in [*code, Instruction(-1, "", "EXIT", "")]:
        if each.name in ("BRA", "BAR", "BSYNC", "EXIT", "WARPSYNC", "SHFL"):
            findings += [text for stores in run.values() for text in _adjacent(stores)]
            run.clear()
        found = _ADDRESS.search(each.operands) if each.name == "STS" else None
        if found:
            run[each.predicate, f"{found[1]} {found[2]}"][int(found[3] or "0", 16)] = each
    return findings


def _adjacent(stores: dict[int, Instruction]) -> Iterator[str]:
    for at, each in sorted(stores.items()):
        width = each.bytes
        if width >= 16 or at % 16:
            continue
        group = [stores.get(at + k * width) for k in range(16 // width)]
        if all(one is not None and one.bytes == width for one in group):
            yield f"{len(group)} stores of {width} bytes, from {each} on, fill 16 that one could fill"


def before_wait(code: Code) -> list[str]:
    """Finds what a dependent launch (PDL) does before the kernels before it are over, and ways around its wait.

    Allowed are prefetches, and one load of 4 bytes past this multiprocessor's cache, whose value is bounded before it
    becomes an address: the position, which may be stale. Every way through the kernel passes the wait, so that a
    kernel further on may rely on all before it.
    """
    if not any(each.name == "ACQBULK" for each in code):
        return ["expected a wait for the kernels before this one, found none"]
    reached, findings = _reached_before_wait(code)
    loads = []
    for each in (code[i] for i in sorted(reached)):
        if each.never:
            continue
        if each.name == "LDG" and "STRONG" in each.modifiers and each.bytes == 4:
            loads.append(each)
        elif each.name in LOADS | STORES | BULK:
            findings.append(f"{each} comes before the wait for the kernels before this one")
    if len(loads) > 1:
        findings += [f"{each} is a second load before the wait" for each in loads[1:]]
    if loads and not _bounds([code[i] for i in sorted(reached)]):
        findings.append(f"what {loads[0]} gives is not bounded before the wait")
    return findings


def _bounds(code: Code) -> bool:
    """Returns whether the lesser of two numbers is taken: by one instruction, or by comparing and choosing."""
    compared = {frozenset(each.operands.split(", ")[2:4]) for each in code if each.name in ("ISETP", "UISETP")}
    chosen = {frozenset(each.operands.split(", ")[1:3]) for each in code if each.name in ("SEL", "USEL")}
    return bool(compared & chosen) or any(each.name.endswith("MNMX") for each in code)


def _reached_before_wait(code: Code) -> tuple[set[int], list[str]]:
    """Returns which instructions can be executed before a wait, and findings about ways that avoid it."""
    index = {each.address: i for i, each in enumerate(code)}
    reached: set[int] = set()
    findings: list[str] = []
    todo = [0]
    while todo:
        i = todo.pop()
        if i in reached or i >= len(code):
            continue
        reached.add(i)
        each = code[i]
        if each.name == "ACQBULK" or each.never:
            todo += [i + 1] if each.never else []
            continue
        if each.name == "EXIT" and not each.never:
            findings.append(f"{each} ends a thread that has not waited")
        if each.name == "RET":  # to what follows the call, which is followed from there
            continue
        if each.name in ("BRX", "JMX"):
            findings.append(f"{each} before the wait leads to where nobody can tell")
            continue
        if each.target is not None and each.target in index:
            todo.append(index[each.target])
        if each.name not in ("BRA", "JMP", "EXIT") or each.conditional:
            todo.append(i + 1)
    return reached, findings


# PTX, which says of every load how it is ordered, and of every address which argument it comes from.


@dataclass(frozen=True)
class Statement:
    """One instruction of PTX: `ld.global.cg.f32 %f1, [%rd2+4]` has this opcode, and these operands in their order."""

    opcode: str
    operands: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """Returns the opcode in parts."""
        return self.opcode.split(".")

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"


_STATEMENT = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*(?:[.:]+[a-z0-9_]+)*)\s+(.*);")


def entries(ptx: str) -> Iterator[tuple[str, list[Statement]]]:
    """Yields the name and statements of each kernel of a PTX module."""
    for part in re.split(r"^\s*(?:\.visible\s+)?\.entry\s+", ptx, flags=re.MULTILINE)[1:]:
        name = re.match(r"[\w$]+", part)
        found = (_STATEMENT.match(line) for text in part.splitlines() for line in _statements(text))
        yield (name[0] if name else ""), [Statement(f[1].replace("::", "."), _operands(f[2])) for f in found if f]


def _statements(line: str) -> list[str]:
    """Returns the statements of a line, of which inline assembly has several in braces."""
    return [f"{part.strip().lstrip('{').strip()};" for part in line.split(";")[:-1]]


def _operands(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\[[^\]]*\]|%\w+|\{[^}]*\}|[\w$.+-]+", text))


def _registers(text: str) -> list[str]:
    return re.findall(r"%\w+", text)


def origins(code: list[Statement]) -> dict[str, set[str]]:
    """Returns the arguments that each register of 64 bits may point to, by where they lie among the parameters."""
    found: dict[str, set[str]] = defaultdict(set)
    changed = True
    while changed:
        changed = False
        for each in code:
            if not each.operands or (each.parts[0] in ("st", "red", "ld") and "param" not in each.parts):
                continue
            if each.parts[0] == "ld":
                sources = {each.operands[1].strip("[]")} if each.parts[-1].endswith("64") else set()
            else:
                sources = {origin for text in each.operands[1:] for r in _registers(text) for origin in found[r]}
            for target in _registers(each.operands[0]):
                if target.startswith(("%rd", "%r")) and not sources <= found[target]:
                    found[target] |= sources
                    changed = True
    return found


def _address(each: Statement) -> str:
    """Returns the register of a global access's address."""
    return next((r for text in each.operands if text.startswith("[") for r in _registers(text)), "")


def weak_loads(code: list[Statement]) -> list[str]:
    """Finds loads that PTX lets be answered by a cache that other blocks' writes do not reach.

    Allowed are `.cg`, acquires, and `.nc`, of what nobody writes.
    """
    return [
        f"`{each}` may be answered by the multiprocessor's own cache"
        for each in code
        if each.parts[:2] == ["ld", "global"] and not {"cg", "nc", "acquire", "relaxed"} & set(each.parts)
    ]


def written_constants(code: list[Statement]) -> list[str]:
    """Finds arguments that are read as constants (`.nc`, or copied asynchronously) although the kernel writes them."""
    of = origins(code)
    written = {
        origin
        for each in code
        if each.parts[:2] in (["st", "global"], ["red", "global"])
        for origin in of[_address(each)]
    }
    read = {
        origin: each
        for each in code
        if each.parts[:2] == ["ld", "global"] and "nc" in each.parts
        for origin in of[_address(each)]
    }
    return [
        f"`{each}` reads as a constant what the kernel writes ({origin})"
        for origin, each in read.items()
        if origin in written
    ]


def stale_parts(code: list[Statement]) -> list[str]:
    """Finds loads of what programs exchange at an atomic counter that may come from a program's own cache.

    What is stored before the counter and loaded after it, by the program that came last, is loaded past that cache.
    """
    counters = [i for i, each in enumerate(code) if each.parts[:2] == ["atom", "global"]]
    if not counters:
        return []
    of = origins(code)
    shared = {
        origin for each in code[: counters[0]] if each.parts[:2] == ["st", "global"] for origin in of[_address(each)]
    }
    return [
        f"`{each}` may not see the parts of other programs"
        for each in code[counters[0] :]
        if each.parts[:2] == ["ld", "global"]
        and not {"cg", "acquire"} & set(each.parts)
        and of[_address(each)] & shared
    ]


Of = TypeVar("Of")
Rule = Callable[[Of], list[str]]

CUDA_SASS: dict[str, Rule[Code]] = {
    "plain load": plain_loads,
    "barrier": grid_barrier,
    "watchdog": watchdog,
    "local memory": local_memory,
    "late load": late_loads,
    "narrow store": narrow_stores,
}
"""The rules for the CUDA engine's kernel, by name."""

CUDA_PTX: dict[str, Rule[list[Statement]]] = {"weak load": weak_loads, "written constant": written_constants}
TRITON_SASS: dict[str, Rule[Code]] = {"barrier": barrier, "local memory": local_memory}
TRITON_PTX: dict[str, Rule[list[Statement]]] = {"stale part": stale_parts}
DEPENDENT: dict[str, Rule[Code]] = {"before the wait": before_wait}
"""The rules for kernels that are launched before those before them are over."""
