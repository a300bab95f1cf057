//! What the processes of a machine use, as the kernel counts it.

use procfs::process::{Process, Stat};

/// Threads of a machine that are its virtual processors are called so, and by their number.
const VCPU: &str = "vcpu";

/// What a machine's processes have used so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Milliseconds of processor time, children included.
    pub cpu_ms: u64,
    /// The same of each virtual processor, by its number.
    pub vcpu_ms: Vec<u64>,
    /// Bytes of the host's memory.
    pub resident_bytes: u64,
}

/// Looks at a process, its threads and its children; `None` when it is gone.
#[must_use]
pub fn of_machine(pid: u32) -> Option<Usage> {
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    let mut usage = Usage {
        cpu_ms: cpu_ms(&process.stat().ok()?),
        // Memory that is mapped several times counts once.
        resident_bytes: resident_bytes(&process)?,
        ..Usage::default()
    };
    for task in process.tasks().ok()?.flatten() {
        // Threads end at any time.
        let Ok(stat) = task.stat() else { continue };
        let children = task.children().unwrap_or_default();
        let mut children_ms = 0;
        for child in children.into_iter().filter_map(of_child) {
            children_ms += child.cpu_ms;
            usage.resident_bytes += child.resident_bytes;
        }
        usage.cpu_ms += children_ms;
        let number = stat.comm.strip_prefix(VCPU).and_then(|number| number.parse::<u8>().ok());
        if let Some(number) = number.map(usize::from) {
            if usage.vcpu_ms.len() <= number {
                usage.vcpu_ms.resize(number + 1, 0);
            }
            if let Some(of_vcpu) = usage.vcpu_ms.get_mut(number) {
                // What it waited for counts for the process, and not for a thread.
                *of_vcpu += ticks_ms(stat.utime + stat.stime) + children_ms;
            }
        }
    }
    Some(usage)
}

/// Milliseconds of processor time of this process alone, whose children are machines, and the bytes of
/// its memory.
#[must_use]
pub fn of_this_process() -> Option<(u64, u64)> {
    let process = Process::myself().ok()?;
    let stat = process.stat().ok()?;
    let resident_bytes = stat.rss.saturating_mul(procfs::page_size());
    Some((ticks_ms(stat.utime + stat.stime), resident_bytes))
}

/// A process that executes user code of the guest, or the network's.
fn of_child(pid: u32) -> Option<Usage> {
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    Some(Usage {
        cpu_ms: cpu_ms(&process.stat().ok()?),
        // Its share of the memory that it has in common with the machine.
        resident_bytes: resident_bytes(&process)?,
        ..Usage::default()
    })
}

fn cpu_ms(stat: &Stat) -> u64 {
    let waited = stat.cutime.saturating_add(stat.cstime);
    ticks_ms(stat.utime + stat.stime + u64::try_from(waited).unwrap_or(0))
}

fn ticks_ms(ticks: u64) -> u64 {
    ticks.saturating_mul(1000) / procfs::ticks_per_second().max(1)
}

fn resident_bytes(process: &Process) -> Option<u64> {
    if let Ok(rollup) = process.smaps_rollup() {
        let pss = rollup.memory_map_rollup.0.iter().filter_map(|map| map.extension.map.get("Pss"));
        return Some(pss.sum());
    }
    Some(process.statm().ok()?.resident.saturating_mul(procfs::page_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_uses_time_and_memory() {
        let page = vec![1u8; 8 << 20];
        let me = of_machine(std::process::id()).unwrap();
        assert!(me.resident_bytes > page.iter().map(|byte| u64::from(*byte)).sum());
        assert!(me.vcpu_ms.is_empty());
        assert_eq!(of_machine(u32::MAX), None);
        let (_, resident_bytes) = of_this_process().unwrap();
        assert!(resident_bytes > 8 << 20);
    }
}
