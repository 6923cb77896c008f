"""Kernels compiled for ARM64, and run by an emulator of it on any processor.

The emulator has the code at addresses of its own, and sees the memory of this process at the addresses that it has
here, so that kernels can be called as if they were this processor's.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import llvmlite.binding as llvm

from dask_batchinv.kernels.emit import compiler

#: Bytes of the vectors of all ARM64 processors.
VECTOR_NBYTES = 16
_CODE, _STACK, _STACK_NBYTES, _END = 0x10000, 0x4000000, 2**20, 0xF000
_PAGE = 4096
#: Where calls of the C library lead.
_LIBRARY = {"memset": 0xE000, "memcpy": 0xE004}
#: By how much the low bits of an address are shifted in an instruction, by the type of relocation: instructions that
#: add them, and loads and stores of 1 to 16 bytes.
_LOW_BITS = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}
_PAGES, _JUMPS = 275, (282, 283)


@cache
def _target() -> Any:
    compiler.vector_nbytes()  # which initializes LLVM
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    return target.create_target_machine(cpu="generic", features="", opt=1, reloc="pic", codemodel="small")


def functions(text: str) -> Callable[[str], Callable[..., None]]:
    """Compile LLVM's text; return what gives its functions by name."""
    return _Machine(compiler._compile(text, _target())).function


class _Machine:
    """An emulated processor with an object file in its memory."""

    def __init__(self, code: bytes):
        import unicorn
        from elftools.elf.elffile import ELFFile

        self._uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._elf = ELFFile(io.BytesIO(code))
        self._places: dict[int, int] = {}
        end = _CODE
        for number, section in enumerate(self._elf.iter_sections()):
            if section["sh_flags"] & 2 and section.name != ".eh_frame":  # SHF_ALLOC
                self._places[number] = end = -(-end // 64) * 64
                end += section["sh_size"]
        memory = bytearray(-(-end // _PAGE) * _PAGE)
        for number, place in self._places.items():
            data = self._elf.get_section(number).data()
            memory[place : place + len(data)] = data
        self._symbols = {
            symbol.name: self._address(symbol)
            for symbol in self._elf.get_section_by_name(".symtab").iter_symbols()
            if symbol["st_shndx"] in self._places or symbol["st_shndx"] == "SHN_UNDEF"
        }
        self._relocate(memory)
        self._uc.mem_map(0, len(memory))
        self._uc.mem_write(_CODE, bytes(memory[_CODE:]))
        for place in _LIBRARY.values():
            self._uc.mem_write(place, (0xD65F03C0).to_bytes(4, "little"))  # ret
        self._uc.mem_map(_STACK, _STACK_NBYTES)
        self._uc.hook_add(
            unicorn.UC_HOOK_CODE, self._call_library, begin=min(_LIBRARY.values()), end=max(_LIBRARY.values())
        )
        unmapped = unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED
        self._uc.hook_add(unmapped, self._show_page)

    def _address(self, symbol: Any) -> int:
        if symbol["st_shndx"] == "SHN_UNDEF":
            return _LIBRARY.get(symbol.name, 0)
        return self._places[symbol["st_shndx"]] + int(symbol["st_value"])

    def _relocate(self, memory: bytearray) -> None:
        symbols = self._elf.get_section_by_name(".symtab")
        for section in self._elf.iter_sections():
            if section["sh_type"] != "SHT_RELA" or section["sh_info"] not in self._places:
                continue
            for each in section.iter_relocations():
                place = self._places[section["sh_info"]] + each["r_offset"]
                symbol = symbols.get_symbol(each["r_info_sym"])
                goal, kind = self._address(symbol) + each["r_addend"], each["r_info_type"]
                assert goal >= min(_LIBRARY.values()), f"{symbol.name} is nowhere"
                word = int.from_bytes(memory[place : place + 4], "little")
                if kind in _LOW_BITS:
                    word |= ((goal & 0xFFF) >> _LOW_BITS[kind]) << 10
                elif kind == _PAGES:
                    pages = (goal >> 12) - (place >> 12)
                    word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
                else:
                    assert kind in _JUMPS, f"relocation {kind}"
                    word |= ((goal - place) >> 2) & 0x3FFFFFF
                memory[place : place + 4] = word.to_bytes(4, "little")

    def _show_page(self, uc: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        """Let the emulator see the memory of this process from the first time that it asks for it."""
        for page in {address // _PAGE * _PAGE, (address + size - 1) // _PAGE * _PAGE}:
            if page >= 2**32:
                uc.mem_map_ptr(page, _PAGE, 3, ctypes.c_void_p(page))
        return address >= 2**32

    def _call_library(self, uc: Any, address: int, size: int, data: Any) -> None:
        from unicorn import arm64_const as arm

        target, second, count = (
            uc.reg_read(r) for r in (arm.UC_ARM64_REG_X0, arm.UC_ARM64_REG_X1, arm.UC_ARM64_REG_X2)
        )
        if address == _LIBRARY["memset"]:
            uc.mem_write(target, bytes([second & 255]) * count) if target < 2**32 else ctypes.memset(
                target, second, count
            )
        else:
            content = bytes(uc.mem_read(second, count)) if second < 2**32 else ctypes.string_at(second, count)
            uc.mem_write(target, content) if target < 2**32 else ctypes.memmove(target, content, count)

    def function(self, name: str) -> Callable[..., None]:
        """Return a function of the object file, to be called with integers."""
        return partial(self._call, self._symbols[name])

    def _call(self, start: int, *arguments: int) -> None:
        from unicorn import arm64_const as arm

        for i, argument in enumerate(arguments):
            self._uc.reg_write(arm.UC_ARM64_REG_X0 + i, int(argument))
        self._uc.reg_write(arm.UC_ARM64_REG_SP, _STACK + _STACK_NBYTES - 64)
        self._uc.reg_write(arm.UC_ARM64_REG_LR, _END)
        self._uc.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # or vectors are not there
        self._uc.emu_start(start, _END)
