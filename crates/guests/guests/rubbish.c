// Rubbish into everything the machine has: rings and registers of every virtio device, PCI
// configuration space of every function, ports, MSRs. A test changes `settings` in the file to choose
// the seed. A careful run spares what would end the machine or destroy the guest itself, and checks at
// the end that every device still works. A wild run spares nothing; any end of the guest is right.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

volatile struct {
    char mark[16];
    u64 seed;
    u32 wild;
    u32 rounds;
} settings = {"berth-rubbish-1", 1, 0, 2};

extern u64 checks_ok, checks_failed;
int try_rdmsr(u32 msr);
int try_wrmsr(u32 msr, u64 value);

__asm__(".text\n"
        ".globl try_rdmsr, try_wrmsr\n"
        "try_rdmsr: movq $1f, fixup\n movq %rsp, fixup_rsp\n movl %edi, %ecx\n rdmsr\n"
        " xorl %eax, %eax\n jmp 2f\n"
        "try_wrmsr: movq $1f, fixup\n movq %rsp, fixup_rsp\n movl %edi, %ecx\n movq %rsi, %rax\n"
        " movq %rsi, %rdx\n shrq $32, %rdx\n wrmsr\n xorl %eax, %eax\n jmp 2f\n"
        "1: movl $1, %eax\n"
        "2: movq $0, fixup\n ret\n");

static u64 state;

static u64 any(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull >> 16 | state << 48;
}
static u32 below(u32 n) { return (u32)(any() >> 8) % n; }

static void outb(u16 port, u8 v) { __asm__ volatile("outb %0, %1" ::"a"(v), "Nd"(port)); }
static void outw(u16 port, u16 v) { __asm__ volatile("outw %0, %1" ::"a"(v), "Nd"(port)); }
static void outl(u16 port, u32 v) { __asm__ volatile("outl %0, %1" ::"a"(v), "Nd"(port)); }
static u8 inb(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static u16 inw(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static u32 inl(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

static void print(const char *text) {
    for (; *text; text++) {
        while (!(inb(0x3fd) & 0x20)) {}
        outb(0x3f8, (u8)*text);
    }
}
static void check(const char *name, int good) {
    if (good) checks_ok++; else checks_failed++;
    print(good ? "ok " : "FAIL ");
    print(name);
    print("\n");
}

// ---- PCI

static u32 config_address(u32 slot, u32 reg) { return 1u << 31 | slot << 11 | (reg & 0xfc); }
static u32 config_read(u32 slot, u32 reg) {
    outl(0xcf8, config_address(slot, reg));
    return inl(0xcfc);
}
static u8 config_byte(u32 slot, u32 reg) { return (u8)(config_read(slot, reg) >> (reg & 3) * 8); }
static void config_write(u32 slot, u32 reg, u32 value) {
    outl(0xcf8, config_address(slot, reg));
    outl(0xcfc, value);
}

#define DEVICES 16
static struct device {
    u32 slot, type, bar;
    volatile u8 *common, *notify, *isr, *config, *table;
} devices[DEVICES];
static u32 device_count;

static void find_devices(void) {
    for (u32 slot = 1; slot < 32 && device_count < DEVICES; slot++) {
        u32 id = config_read(slot, 0);
        if ((id & 0xffff) != 0x1af4) continue;
        struct device *d = &devices[device_count++];
        d->slot = slot;
        d->type = (id >> 16) - 0x1040;
        d->bar = config_read(slot, 0x10);
        config_write(slot, 4, 6);
        volatile u8 *base = (volatile u8 *)(u64)(d->bar & ~0xfu);
        u32 at = config_byte(slot, 0x34);
        for (int i = 0; at && i < 32; i++, at = config_byte(slot, at + 1)) {
            u32 id = config_byte(slot, at), kind = config_byte(slot, at + 3);
            volatile u8 *there = base + config_read(slot, at + 8);
            if (id == 0x11) d->table = base + (config_read(slot, at + 4) & ~7u);
            if (id != 9) continue;
            if (kind == 1) d->common = there;
            if (kind == 2) d->notify = there;
            if (kind == 3) d->isr = there;
            if (kind == 4) d->config = there;
        }
    }
}

// ---- virtio

#define W8(at, v) (*(volatile u8 *)(at) = (u8)(v))
#define W16(at, v) (*(volatile u16 *)(at) = (u16)(v))
#define W32(at, v) (*(volatile u32 *)(at) = (u32)(v))
#define W64(at, v) (*(volatile u64 *)(at) = (u64)(v))
#define R16(at) (*(volatile u16 *)(at))
#define R32(at) (*(volatile u32 *)(at))

// The guest itself is below; devices are only told addresses from here on, unless it is wild.
#define DMA 0x1000000ull
#define DMA_END 0x4000000ull
#define QUEUES 4
#define RINGS(queue) (DMA + (queue) * 0x10000ull)
#define AVAILABLE 0x8000
#define USED 0xc000
#define SIZE 64

static u64 address(void) {
    switch (below(8)) {
    case 0: return settings.wild ? any() & 0x3ffffff : DMA_END - below(64);
    case 1: return any() | 1ull << 40;
    case 2: return RINGS(below(QUEUES)) + below(0x10000);
    default: return DMA + below((u32)(DMA_END - DMA));
    }
}
static u32 length(void) {
    static const u32 odd[] = {0, 1, 16, 511, 512, 4096, 0x7fffffff, 0xffffffff};
    return below(3) ? below(5000) : below(4) ? odd[below(8)] : (u32)any();
}

static int reset(struct device *d) {
    W8(d->common + 20, 0);
    for (u32 i = 0; i < 200000000; i++)
        if (!d->common[20]) return 1;
    return 0;
}

static void start(struct device *d, int honest) {
    W8(d->common + 20, 1);
    W8(d->common + 20, 3);
    for (u32 half = 0; half < 2; half++) {
        W32(d->common + 0, half);
        u32 offered = R32(d->common + 4);
        W32(d->common + 8, half);
        if (honest)
            W32(d->common + 12, half);
        else
            W32(d->common + 12, below(8) ? (offered & (u32)any()) | half : (u32)any());
    }
    W8(d->common + 20, 0xb);
    for (u32 queue = 0; queue < QUEUES; queue++) {
        W16(d->common + 22, queue);
        if (!R16(d->common + 24)) continue;
        int good = honest || below(4);
        W16(d->common + 24, good ? SIZE : below(3) ? 1u << below(17) : below(0x10000));
        W16(d->common + 26, 0xffff);
        W64(d->common + 32, good ? RINGS(queue) : address());
        W64(d->common + 40, good ? RINGS(queue) + AVAILABLE : address());
        W64(d->common + 48, good ? RINGS(queue) + USED : address());
        W16(d->common + 28, 1);
    }
    W8(d->common + 20, 0xf);
}

static void descriptor(u64 at, u64 buffer, u32 len, u16 flags, u16 next) {
    W64(at, buffer);
    W32(at + 8, len);
    W16(at + 12, flags);
    W16(at + 14, next);
}

// Requests as devices know them, so that rubbish gets behind the first look at them.
static void header(struct device *d, u64 at) {
    if (d->type == 2) {
        W32(at, below(3) ? below(16) : (u32)any());
        W64(at + 8, below(3) ? below(200) : any());
    } else if (d->type == 19) {
        W64(at, below(4) ? 3 : any());
        W64(at + 8, below(4) ? 2 : any());
        W32(at + 16, below(5));
        W32(at + 20, below(2) ? 1024 : 1u << 30 | below(5));
        W32(at + 24, below(3) ? below(5000) : (u32)any());
        W16(at + 28, below(4) ? 1 : any());
        W16(at + 30, below(9));
        W32(at + 32, any());
        W32(at + 36, any());
        W32(at + 40, any());
    } else {
        for (u32 i = 0; i < 64; i += 8) W64(at + i, any() & any());
    }
}

static void ring_rubbish(struct device *d) {
    u32 queue = below(QUEUES);
    u64 ring = RINGS(queue);
    for (u32 n = below(20); n; n--) {
        u32 head = below(SIZE);
        u64 buffer = DMA + 0x100000 + below(0x100000);
        header(d, buffer);
        if (below(2)) {
            // As a driver would: a header, data, a byte for the status.
            descriptor(ring + head * 16, buffer, below(2) ? 16 : 44, 1, (head + 1) % SIZE);
            descriptor(ring + (head + 1) % SIZE * 16, address(), length(), below(2) ? 1 : 3,
                       (head + 2) % SIZE);
            descriptor(ring + (head + 2) % SIZE * 16, address(), 1, 2, 0);
        } else {
            descriptor(ring + head * 16, address(), length(), below(8), below(SIZE + 2));
        }
        u16 at = R16(ring + AVAILABLE + 2);
        W16(ring + AVAILABLE + 4 + at % SIZE * 2, head);
        W16(ring + AVAILABLE + 2, at + 1);
    }
    if (!below(20)) W16(ring + AVAILABLE + 2, any());
    if (!below(10)) W64(ring + below(0x10000 - 8), any());
    W16(ring + AVAILABLE, below(2));
    W16(d->notify + 4 * queue, queue);
    if (!below(4)) W32(d->notify + below(0x1000 - 4), any());
}

static void register_rubbish(struct device *d) {
    u32 at = below(64);
    switch (below(6)) {
    case 0: W8(d->common + at, below(2) ? any() : 0xf); break;
    case 1: W16(d->common + (at & ~1u), below(70)); break;
    case 2: W32(d->common + (at & ~3u), any()); break;
    case 3:
        if (d->config) W32(d->config + below(256), any());
        break;
    case 4: (void)*(volatile u8 *)d->isr; break;
    default:
        if (!d->table) break;
        volatile u8 *entry = d->table + below(8) * 16;
        // To elsewhere, or an ordinary interrupt to a processor that takes none.
        int message = below(2);
        W64(entry, settings.wild ? 0xfee00000 | (any() & 0xff00c) : message ? 0xfee00000 : any() >> 36);
        W32(entry + 8, settings.wild ? (u32)any() : 0x40);
        W32(entry + 12, below(2));
    }
}

static int device_rubbish(struct device *d) {
    int good = 1;
    for (u32 round = 0; round < settings.rounds; round++) {
        for (u64 at = RINGS(0); at < RINGS(QUEUES); at += 8) W64(at, 0);
        start(d, 0);
        for (u32 n = 20; n; n--) {
            if (below(3)) ring_rubbish(d); else register_rubbish(d);
        }
        good &= reset(d);
    }
    return good;
}

// Whether one honest request is answered.
static int works(struct device *d) {
    if (!reset(d)) return 0;
    for (u64 at = RINGS(0); at < RINGS(QUEUES); at += 8) W64(at, 0);
    start(d, 1);
    u64 ring = RINGS(0), buffer = DMA + 0x200000;
    for (u32 i = 0; i < 1024; i += 8) W64(buffer + i, 0);
    if (d->type == 4) {
        descriptor(ring, buffer, 256, 2, 0);
    } else if (d->type == 2) {
        descriptor(ring, buffer, 16, 1, 1);
        descriptor(ring + 16, buffer + 16, 512, 3, 2);
        descriptor(ring + 32, buffer + 600, 1, 2, 0);
        W8(buffer + 600, 0xff);
    } else {
        // Nothing that would be answered by itself: being accepted must do.
        return d->common[20] == 0xf && reset(d);
    }
    W16(ring + AVAILABLE + 2, 1);
    W16(d->notify, 0);
    for (u32 i = 0; i < 200000000; i++) {
        if (R16(ring + USED + 2) != 1) continue;
        int good = d->type == 2 ? *(volatile u8 *)(buffer + 600) == 0 : R32(ring + USED + 8) == 256;
        return good && reset(d);
    }
    return 0;
}

// ---- everything else

static void config_rubbish(u32 slot) {
    u32 bar = config_read(slot, 0x10);
    for (u32 n = 60; n; n--) {
        u32 reg = below(256);
        outl(0xcf8, config_address(slot, reg));
        switch (below(3)) {
        case 0: outb(0xcfc + below(4), any()); break;
        case 1: outw(0xcfc + below(4), any()); break;
        default: outl(0xcfc + below(2), any());
        }
        (void)inl(0xcfc + below(4));
    }
    // The window of the access capability may have started anything.
    config_write(slot, 0x10, bar);
    config_write(slot, 4, 6);
}

static int ends_the_machine(u32 port) {
    return port == 0x60 || port == 0x64 || port == 0x92 || (port >= 0xf1 && port < 0xf8) ||
           (port >= 0x3f5 && port < 0x400) || (port >= 0xcf5 && port < 0xd00) ||
           (port >= 0x5fd && port < 0x620) || (port >= 0x5d && port < 0x65) || (port >= 0x8f && port < 0x93);
}

static void port_rubbish(u32 count) {
    for (; count; count--) {
        u32 port = below(3) ? below(0x1000) : below(0x10000);
        if (!settings.wild && ends_the_machine(port)) continue;
        switch (below(6)) {
        case 0: outb(port, any()); break;
        case 1: outw(port, any()); break;
        case 2: outl(port, any()); break;
        case 3: (void)inb(port); break;
        case 4: (void)inw(port); break;
        default: (void)inl(port);
        }
    }
}

static void msr_rubbish(u32 count) {
    static const u32 ranges[][2] = {{0, 0x400}, {0x400, 0x1c00}, {0xc0000000, 0x200},
                                    {0xc0010000, 0x200}, {0x40000000, 0x120}, {0x4b564d00, 16}, {0x12, 1},
                                    {0x800, 0x40}};
    for (; count; count--) {
        u32 which = below(sizeof ranges / sizeof *ranges);
        u32 msr = ranges[which][0] + below(ranges[which][1]);
        u64 value = below(2) ? any() : below(2) ? 1ull << below(64) : below(256);
        try_rdmsr(msr);
        if (!settings.wild) {
            // The processor's mode, the APIC's, and where the host would write time.
            if (msr == 0xc0000080 || msr == 0x1b || (msr >= 0x800 && msr < 0x900)) continue;
            if (msr >> 8 == 0x4b564d || msr == 0x11 || msr == 0x12) value = address() | 1;
        }
        try_wrmsr(msr, value);
    }
}

int main(void) {
    state = settings.seed * 0x9e3779b97f4a7c15ull | 1;
    find_devices();
    check("virtio devices found", device_count >= 2);
    int good = 1;
    for (u32 i = 0; i < device_count; i++) good &= device_rubbish(&devices[i]);
    check("rings and registers", good);
    for (u32 n = settings.rounds; n; n--)
        for (u32 slot = 0; slot < 32; slot++) config_rubbish(slot);
    check("configuration space", 1);
    // A wild run seldom outlives its ports.
    if (settings.wild && below(2)) msr_rubbish(500);
    port_rubbish(2000 * settings.rounds);
    check("ports", 1);
    msr_rubbish(500 * settings.rounds);
    check("msrs", 1);
    good = 1;
    for (u32 i = 0; i < device_count; i++) {
        int this = works(&devices[i]);
        if (!this) {
            char name[] = "device of type ?? is lost\n";
            name[15] = '0' + devices[i].type / 10;
            name[16] = '0' + devices[i].type % 10;
            print(name);
        }
        good &= this;
    }
    check("every device works", good);
    return 0;
}
