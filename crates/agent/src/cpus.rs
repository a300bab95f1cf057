//! Which of the guest's processors its kernel uses.

use std::fs;
use std::io;
use std::path::Path;

/// A folder for each processor, in which `online` says whether it is used; the first may have none,
/// since it always is.
const CPUS: &str = "/sys/devices/system/cpu";

/// Lets the kernel use the first `count` processors and no others; says how many it uses then.
///
/// # Errors
/// There are not so many, or the kernel refuses.
pub fn use_first(count: u32) -> Result<u32, String> {
    use_first_of(Path::new(CPUS), count)
}

fn use_first_of(cpus: &Path, count: u32) -> Result<u32, String> {
    let numbers = numbers(cpus).map_err(|error| format!("{}: {error}", cpus.display()))?;
    let there = numbers.len();
    if count == 0 || numbers.iter().filter(|number| **number < count).count() != count as usize {
        return Err(format!("the guest has {there} processors, and cannot use {count}"));
    }
    // The last go first.
    for number in numbers.into_iter().rev() {
        let path = cpus.join(format!("cpu{number}/online"));
        let wanted = if number < count { "1" } else { "0" };
        let failed = |error: io::Error| format!("processor {number}: {error}");
        match fs::read_to_string(&path) {
            Ok(is) if is.trim() == wanted => {}
            Ok(_) => fs::write(&path, wanted).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && wanted == "1" => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(count)
}

/// The numbers of all processors, rising.
fn numbers(cpus: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(cpus)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu")?.parse::<u32>().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use std::fs;

    #[test]
    fn the_last_processors_are_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let online = |number: u32| dir.path().join(format!("cpu{number}/online"));
        for number in 0..4 {
            fs::create_dir(dir.path().join(format!("cpu{number}"))).unwrap();
            if number > 0 {
                fs::write(online(number), "1\n").unwrap();
            }
        }
        fs::create_dir(dir.path().join("cpufreq")).unwrap();
        let state = || (1..4).map(|n| fs::read_to_string(online(n)).unwrap()).collect::<String>();
        let set = |count| super::use_first_of(dir.path(), count);
        assert_eq!((set(2), state()), (Ok(2), "1\n00".into()));
        assert_eq!((set(1), state()), (Ok(1), "000".into()));
        assert_eq!((set(4), state()), (Ok(4), "111".into()));
        for bad in [0, 5] {
            assert!(set(bad).unwrap_err().contains("has 4 processors"));
        }
        assert_eq!(state(), "111");
    }
}
