/* Executes AMX's instructions on a processor that has none, for tests: each traps, is decoded as
 * the processor would, and done by the emulation.
 *
 * Linked into a library that was compiled for AMX. So what is tried is the machine code: the
 * operands that the compiler chose, and what it had written to the memory by then. Linux and x86-64;
 * the system is taken to let the process use tiles, and not asked.
 */
#define _GNU_SOURCE /* REG_RIP */
#define M1_EMULATED_TILES "emulated_tiles.h"
#include "tiles.h"

#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>

/* Of the registers by their numbers in an instruction. */
static const int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

/* An instruction with a VEX prefix of three bytes: C4, RXB and map, W vvvv L pp, opcode, ModRM. */
typedef struct {
    int prefix, opcode; /* of which `prefix`: 0 none, 2 F3, 3 F2 */
    int mod, reg, rm;   /* tiles are 0 to 7: `reg` and `rm` need no fourth bit */
    int third;          /* vvvv */
    int64_t base, index;
    int length;
} Instruction;

static int64_t displacement(const uint8_t *at, int bytes)
{
    int32_t four = 0;
    memcpy(&four, at, (size_t)bytes);
    return bytes == 1 ? (int8_t)four : four;
}

/* The operand in memory: base and displacement, and index (the stride) where there is a SIB byte. */
static void decode_memory(Instruction *found, const uint8_t *code, const greg_t *registers)
{
    const int beyond = code[1] & 0x20 ? 0 : 8, index_beyond = code[1] & 0x40 ? 0 : 8;
    int base = found->rm, bytes = found->mod == 1 ? 1 : found->mod == 2 ? 4 : 0;
    if (found->rm == 4) {
        const int index = (code[5] >> 3 & 7) + index_beyond;
        base = code[5] & 7;
        found->length++;
        found->index = index == 4 ? 0 : registers[order[index]] << (code[5] >> 6);
    }
    const int none = found->mod == 0 && base == 5;
    bytes = none ? 4 : bytes;
    found->base = none ? 0 : registers[order[base + beyond]];
    found->base += displacement(code + found->length, bytes);
    found->length += bytes;
    if (none && found->rm == 5) /* from the next instruction on */
        found->base += registers[REG_RIP] + found->length;
}

static Instruction decode(const uint8_t *code, const greg_t *registers)
{
    Instruction found = {
        .prefix = code[2] & 3, .opcode = code[3], .mod = code[4] >> 6, .reg = code[4] >> 3 & 7,
        .rm = code[4] & 7, .third = ~code[2] >> 3 & 15, .length = 5,
    };
    if (code[0] != 0xc4 || (code[1] & 31) != 2 || code[2] & 0x84) /* map 0F 38, W0, L0 */
        found.opcode = 0;
    else if (found.mod != 3)
        decode_memory(&found, code, registers);
    return found;
}

/* 0 where it is none of AMX's that we use. */
static int execute(const Instruction *of)
{
    const int what = of->opcode << 4 | of->prefix, in_memory = of->mod != 3;
    if (what == 0x490 && in_memory && of->reg == 0)
        m1_emulated_loadconfig((const void *)of->base);
    else if (what == 0x490 && !in_memory && of->reg == 0 && of->rm == 0)
        m1_emulated_release();
    else if (what == 0x493 && !in_memory && of->rm == 0)
        m1_emulated_zero(of->reg);
    else if (what == 0x4b3 && in_memory && of->rm == 4)
        m1_emulated_load(of->reg, (const void *)of->base, of->index);
    else if (what == 0x4b2 && in_memory && of->rm == 4)
        m1_emulated_store(of->reg, (void *)of->base, of->index);
    else if (what == 0x5e2 && !in_memory)
        m1_emulated_dot(of->reg, of->rm, of->third);
    else
        return 0;
    return 1;
}

static void trapped(int signal_number, siginfo_t *about, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const Instruction found = decode((const uint8_t *)registers[REG_RIP], registers);
    (void)signal_number, (void)about;
    if (!execute(&found))
        abort();
    registers[REG_RIP] += found.length;
}

__attribute__((constructor)) static void set_trap(void)
{
    const struct sigaction trap = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &trap, NULL);
}

/* In place of the C library's, for this library alone: 0 to who asks for tiles, and rightly. */
__attribute__((visibility("hidden"))) long syscall(long number, ...)
{
    va_list given;
    va_start(given, number);
    const int what = va_arg(given, int), of = va_arg(given, int);
    va_end(given);
    return number == SYS_arch_prctl && what == 0x1023 && of == 18 && system_lets_tiles() ? 0 : -1;
}
