//! What a benchmark is: a name, a fixed amount of work, and a checksum that must be the same wherever
//! it runs.

/// The work of one repetition; returns its checksum, the same each time.
pub type Work = Box<dyn FnMut() -> u64>;

/// Which goals a row has to meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Integer code: loops, calls, jumps, loads.
    User,
    /// Vector and floating-point code.
    Vector,
    /// Memory blocks and strings.
    Memory,
    /// Ways into the kernel and back.
    Kernel,
    /// The same work with one thread and with two.
    Scaling,
}

impl Group {
    /// As it is written in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Vector => "vector",
            Self::Memory => "memory",
            Self::Kernel => "kernel",
            Self::Scaling => "scaling",
        }
    }
}

/// One benchmark.
pub struct Row {
    /// Its name, without spaces.
    pub name: &'static str,
    /// Which goals it has to meet.
    pub group: Group,
    /// How many processors it needs.
    pub cpus: usize,
    /// Operations in one repetition: the same everywhere, so that times compare.
    pub ops: u64,
    /// Sets up what is not to be measured. An error says why this machine cannot run it.
    pub prepare: fn(u64) -> Result<Work, String>,
}

/// A row for one processor.
pub const fn row(
    name: &'static str,
    group: Group,
    ops: u64,
    prepare: fn(u64) -> Result<Work, String>,
) -> Row {
    Row { name, group, cpus: 1, ops, prepare }
}

/// Random numbers of fixed quality and seed (xorshift64).
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers everywhere.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// The next number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: usize) -> usize {
        ((self.next() >> 32) as usize) % limit
    }
}
