// Accesses that cross from one page into another while the pages' entries change all the time: missing,
// read-only, not dirty, not accessed, user or supervisor, global or not, of 4 KiB or 2 MiB, backed by RAM
// in order, out of order, twice or not at all. After each change only the changed page is invalidated.
// Each access is compared with a walk of the tables in C (SDM vol. 3, 4.6 to 4.8, 4.10.4): the value, what
// is in memory afterwards, or the fault with its error code and address; and the bits that it sets.
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

extern u64 checks_ok, checks_failed;
extern u64 exc_vec, exc_err, exc_cr2;
extern u64 pml4[512];
void puts(void), puthex(void), call_user(void);

#define RAM_END 0x4000000ull
#define POOL 0x1000000ull
#define REGION 0x200000ull
#define REGIONS 4
#define PAGE 4096ull
#define P 1ull
#define W 2ull
#define U 4ull
#define A 0x20ull
#define D 0x40ull
#define PS 0x80ull
#define G 0x100ull
#define PF 14
#define NO_FAULT (-1ull)
#define CR0_WP 0x10000ull
#define CR4_SMAP 0x200000ull
#define RFLAGS_AC 0x40000ull

// One table of each level for the lower and the upper half; a page table for each 2 MiB.
static u64 pdpt[2][512] __attribute__((aligned(4096)));
static u64 pd[2][512] __attribute__((aligned(4096)));
static u64 pt[2][REGIONS][512] __attribute__((aligned(4096)));
static const u64 bases[2] = {1ull << 39 | 3ull << 30, 0xffff900000000000ull | 5ull << 30};

static u64 state = 0x9e3779b97f4a7c15ull;
static u64 any(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull;
}
static u32 below(u32 n) { return (u32)(any() >> 33) % n; }

static void print(const char *text) {
    __asm__ volatile("call puts" : "+S"(text)::"rax", "rdx", "rcx", "memory");
}
static void print_hex(u64 v) {
    __asm__ volatile("call puthex" : "+a"(v)::"rdx", "rcx", "rsi", "rdi", "memory");
}
static void check(const char *name, int good) {
    if (good) checks_ok++; else checks_failed++;
    print(good ? "ok " : "FAIL ");
    print(name);
    print("\n");
}

static void invlpg(u64 va) { __asm__ volatile("invlpg (%0)" ::"r"(va) : "memory"); }
static u64 read_cr0(void) { u64 v; __asm__ volatile("mov %%cr0, %0" : "=r"(v)); return v; }
static void write_cr0(u64 v) { __asm__ volatile("mov %0, %%cr0" ::"r"(v) : "memory"); }
static u64 read_cr4(void) { u64 v; __asm__ volatile("mov %%cr4, %0" : "=r"(v)); return v; }
static void write_cr4(u64 v) { __asm__ volatile("mov %0, %%cr4" ::"r"(v) : "memory"); }
static void reload_cr3(void) {
    u64 v;
    __asm__ volatile("mov %%cr3, %0; mov %0, %%cr3" : "=r"(v)::"memory");
}

// ---- The accesses. Each is entered with RSI = address, RDX = value, and leaves in RAX what it read.
// INT 0x80 ends it in both modes.
#define EACH(X)                                                                                    \
    X(load1, 1, 1, 0, 0, "movzbl (%rsi), %eax")                                                    \
    X(load2, 2, 1, 0, 0, "movzwl (%rsi), %eax")                                                    \
    X(load4, 4, 1, 0, 0, "movl (%rsi), %eax")                                                      \
    X(load8, 8, 1, 0, 0, "movq (%rsi), %rax")                                                      \
    X(store1, 1, 0, 1, 0, "movb %dl, (%rsi)")                                                      \
    X(store2, 2, 0, 1, 0, "movw %dx, (%rsi)")                                                      \
    X(store4, 4, 0, 1, 0, "movl %edx, (%rsi)")                                                     \
    X(store8, 8, 0, 1, 0, "movq %rdx, (%rsi)")                                                     \
    X(add4, 4, 1, 1, 1, "movl %edx, %eax; lock xaddl %eax, (%rsi)")                                \
    X(add8, 8, 1, 1, 1, "movq %rdx, %rax; xaddq %rax, (%rsi)")                                     \
    X(xchg8, 8, 1, 1, 0, "movq %rdx, %rax; xchgq %rax, (%rsi)")                                    \
    X(loads16, 16, 1, 0, 0, "movups (%rsi), %xmm0; movq %xmm0, %rax")                              \
    X(stores16, 16, 0, 1, 0, "movq %rdx, %xmm0; punpcklqdq %xmm0, %xmm0; movups %xmm0, (%rsi)")    \
    X(pop8, 8, 1, 0, 0, "xchgq %rsi, %rsp; popq %rax; xchgq %rsi, %rsp")                           \
    X(push8, 8, 0, 1, 0, "addq $8, %rsi; xchgq %rsi, %rsp; pushq %rdx; xchgq %rsi, %rsp")          \
    X(movs8, 8, 0, 1, 0, "pushq %rdx; movq %rsi, %rdi; movq %rsp, %rsi; movsq; popq %rdx")

#define CODE(name, size, r, w, add, text)                                                          \
    __asm__(".pushsection .user, \"awx\", @progbits\n.globl " #name "\n" #name ": " text           \
            "\n int $0x80\n.popsection");                                                          \
    extern void name(void);
EACH(CODE)
#define ROW(name, size, r, w, add, text) {name, #name, size, r, w, add},
static const struct access {
    void (*code)(void);
    const char *name;
    u32 size;
    int reads, writes, adds;
} accesses[] = {EACH(ROW)};
#define ACCESSES (sizeof accesses / sizeof *accesses)

extern u64 user_flags;
u64 run_at_0(void (*code)(void), u64 flags, u64 va, u64 value);
// At CPL 0: jumps there with the fix-up armed, as `call_user` does.
__asm__("run_at_0:\n push %rbx\n push %rbp\n movq $-1, exc_vec\n movq $-1, exc_cr2\n"
        " mov %rsp, fixup_rsp\n movq $1f, fixup\n mov %rdi, %rbx\n mov %rdx, %rax\n"
        " mov %rcx, %rdx\n push %rsi\n popfq\n mov %rax, %rsi\n xor %eax, %eax\n jmp *%rbx\n"
        "1: movq $0, fixup\n pop %rbp\n pop %rbx\n ret\n");
u64 run_at_3(void (*code)(void), u64 flags, u64 va, u64 value);
__asm__("run_at_3: mov %rdx, %rsi\n mov %rcx, %rdx\n xor %eax, %eax\n jmp call_user\n");

// ---- The model

struct entry {
    u64 *leaf, rights;
    int large;
};

// What translates `va`; `rights` are those of all levels.
static struct entry entry_of(u64 va) {
    u32 half = va >> 63;
    u64 *at = &pd[half][va >> 21 & 511];
    if (*at & PS) return (struct entry){at, *at, 1};
    if (!(*at & P)) return (struct entry){at, 0, 0};
    u64 *low = &pt[half][va >> 21 & 511][va >> 12 & 511];
    return (struct entry){low, *low & (*at | ~(W | U)), 0};
}

static int supervisor_wp, smap, ac;

// NO_FAULT, or the error code of an access to one page.
static u64 page_fault(u64 va, int user, int write) {
    u64 code = (user ? 4 : 0) | (write ? 2 : 0);
    u64 rights = entry_of(va).rights;
    if (!(rights & P)) return code;
    if (user && !(rights & U)) return code | 1;
    if (write && !(rights & W) && (user || supervisor_wp)) return code | 1;
    if (!user && rights & U && smap && !ac) return code | 1;
    return NO_FAULT;
}

static u64 physical(u64 va) {
    struct entry e = entry_of(va);
    u64 mask = e.large ? REGION - 1 : PAGE - 1;
    return (*e.leaf & 0xffffffffff000ull & ~mask) | (va & mask);
}

static u8 byte_at(u64 va) {
    u64 pa = physical(va);
    return pa < RAM_END ? *(volatile u8 *)pa : 0xff;
}

// ---- Changes

// The pages used of each 2 MiB: the first and the last three.
static u32 used_page(void) {
    static const u32 pages[] = {0, 1, 2, 509, 510, 511};
    return pages[below(6)];
}

static u64 rights(void) {
    u64 r = P | A | W | D;
    if (!below(12)) r &= ~P;
    if (!below(8)) r &= ~W;
    if (!below(6)) r &= ~D;
    if (!below(12)) r &= ~A;
    if (below(2)) r |= U;
    if (!below(3)) r |= G;
    return r;
}

static u64 frame(u64 *before) {
    if (before && below(3)) return (*before & 0xfffffff000ull) + PAGE;
    switch (below(12)) {
    case 0: return RAM_END - PAGE;
    case 1: return RAM_END;
    default: return POOL + below(4) * REGION + used_page() * PAGE;
    }
}

static void change_page(u32 half, u32 region, u32 page) {
    u64 *table = pt[half][region];
    u64 *before = page ? &table[page - 1] : region ? &pt[half][region - 1][511] : 0;
    // Mostly one thing at a time.
    switch (below(5)) {
    case 0: table[page] ^= W; break;
    case 1: table[page] ^= U; break;
    case 2: table[page] ^= below(2) ? D : P; break;
    default: table[page] = frame(before) | rights();
    }
    if (!(pd[half][region] & PS)) invlpg(bases[half] + region * REGION + page * PAGE + below(PAGE));
}

static void change_region(u32 half, u32 region) {
    u64 old = pd[half][region], at = bases[half] + region * REGION;
    if (below(2))
        pd[half][region] = (POOL + below(4) * REGION) | PS | rights();
    else
        pd[half][region] = (u64)pt[half][region] | P | A | (below(8) ? W : 0) | (below(8) ? U : 0);
    // One address is enough for what was a large page.
    if (old & PS) {
        invlpg(at + below(2) * (REGION - PAGE) + below(PAGE));
    } else {
        for (u32 i = 0; i < 3; i++) {
            invlpg(at + i * PAGE);
            invlpg(at + (509 + i) * PAGE);
        }
    }
}

// Code in the middle of a frame, so that the page is protected against writes to translated code.
static int code_works(void) {
    u64 at = POOL + below(4) * REGION + used_page() * PAGE + 0x800;
    u32 want = (u32)any(), got;
    *(volatile u8 *)at = 0xb8;
    *(volatile u32 *)(at + 1) = want;
    *(volatile u8 *)(at + 5) = 0xc3;
    __asm__ volatile("call *%1" : "=&a"(got) : "r"(at) : "memory");
    return got == want;
}

// ---- One access

static int wrong(const char *what, const struct access *a, u64 va, u64 got, u64 want) {
    print("wrong: ");
    print(what);
    print(" of ");
    print(a->name);
    print(" at ");
    print_hex(va);
    print(": got ");
    print_hex(got);
    print(", not ");
    print_hex(want);
    print("\n");
    return 0;
}

static u64 some_address(u32 half) {
    u64 page = bases[half] + below(REGIONS) * REGION + used_page() * PAGE;
    return below(8) ? page + PAGE - below(24) : page + below(PAGE);
}

static int access(int upper) {
    const struct access *a = &accesses[below(ACCESSES)];
    int user = below(3) == 0;
    u64 va = some_address(upper);
    u64 end = bases[upper] + REGIONS * REGION;
    if (va + 16 > end) va = end - 16;
    u64 value = any(), before = 0, expect = 0, fault = NO_FAULT, fault_at = 0;
    ac = !user && below(2);
    u64 next = (va | (PAGE - 1)) + 1;
    int crosses = va + a->size > next;
    fault = page_fault(va, user, a->writes);
    fault_at = va;
    if (fault == NO_FAULT && crosses) {
        fault = page_fault(next, user, a->writes);
        fault_at = next;
    }
    u8 after[16];
    if (fault == NO_FAULT) {
        for (u32 i = 0; i < a->size && i < 8; i++) before |= (u64)byte_at(va + i) << i * 8;
        expect = a->adds ? before + value : value;
        for (u32 i = 0; i < a->size; i++) after[i] = (u8)(expect >> (i & 7) * 8);
    } else {
        for (u32 i = 0; i < a->size; i++) {
            u64 at = va + i;
            int there = entry_of(at).rights & P;
            after[i] = there ? byte_at(at) : 0;
        }
    }
    u64 flags = 2 | (ac ? RFLAGS_AC : 0);
    u64 got = (user ? run_at_3 : run_at_0)(a->code, flags, va, value);
    if (fault != NO_FAULT) {
        if (exc_vec != PF) return wrong("vector", a, va, exc_vec, PF);
        if (exc_err != fault) return wrong("error code", a, va, exc_err, fault);
        if (exc_cr2 != fault_at) return wrong("cr2", a, va, exc_cr2, fault_at);
    } else {
        if (exc_vec != 0x80) {
            wrong("cr2", a, va, exc_cr2, exc_err);
            return wrong("vector", a, va, exc_vec, 0x80);
        }
        if (a->reads && got != before) return wrong("value", a, va, got, before);
        u64 set = A | (a->writes ? D : 0);
        if ((*entry_of(va).leaf & set) != set) return wrong("first entry", a, va, *entry_of(va).leaf, set);
        if (crosses && (*entry_of(next).leaf & set) != set)
            return wrong("second entry", a, va, *entry_of(next).leaf, set);
    }
    for (u32 i = 0; i < a->size; i++) {
        u64 at = va + i;
        if (!(entry_of(at).rights & P)) continue;
        u8 want = fault == NO_FAULT && !a->writes ? byte_at(at) : after[i];
        if (physical(at) >= RAM_END) want = fault == NO_FAULT ? 0xff : want;
        if (byte_at(at) != want) return wrong("memory", a, at, byte_at(at), want);
    }
    return 1;
}

static int round_of(int upper, u32 count) {
    for (; count; count--) {
        for (u32 n = below(4); n; n--) {
            if (below(12))
                change_page(upper, below(REGIONS), used_page());
            else
                change_region(upper, below(REGIONS));
        }
        if (!below(50)) reload_cr3();
        if (!below(20)) {
            supervisor_wp = below(4) != 0;
            write_cr0(supervisor_wp ? read_cr0() | CR0_WP : read_cr0() & ~CR0_WP);
        }
        if (!below(20) && !code_works()) {
            print("wrong: code\n");
            return 0;
        }
        if (!access(upper)) return 0;
    }
    return 1;
}

static int smap_there(void) {
    u32 a = 7, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return b >> 20 & 1;
}

extern u8 idt[];

int main(void) {
    for (u32 half = 0; half < 2; half++) {
        pml4[bases[half] >> 39 & 511] = (u64)pdpt[half] | P | W | U | A;
        pdpt[half][bases[half] >> 30 & 511] = (u64)pd[half] | P | W | U | A;
        for (u32 region = 0; region < REGIONS; region++) {
            pd[half][region] = (u64)pt[half][region] | P | W | U | A;
            for (u32 i = 0; i < 512; i++) pt[half][region][i] = 0;
        }
    }
    for (u64 at = POOL; at < POOL + 4 * REGION; at += 8) *(volatile u64 *)at = any();
    // Faults come with the stack pointer anywhere.
    idt[PF * 16 + 4] = 3;
    idt[0x80 * 16 + 4] = 3;
    supervisor_wp = 1;
    check("lower half", round_of(0, 10000));
    check("upper half", round_of(1, 10000));
    if (smap_there()) {
        smap = 1;
        write_cr4(read_cr4() | CR4_SMAP);
    }
    check("lower half, SMAP", round_of(0, 10000));
    check("upper half, SMAP", round_of(1, 10000));
    return 0;
}
