//! What makes generated code fast and can be left out, to find out which of it is wrong.

use std::str::FromStr;

use bitflags::bitflags;

bitflags! {
    /// Optimizations of a translator.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Optimizations: u32 {
        /// Accesses through the same registers share a look-up.
        const SHARED = 1;
        /// String instructions are emitted.
        const STRINGS = 1 << 1;
        /// System instructions that need little are emitted.
        const SYSTEM = 1 << 2;
        /// SYSCALL and SYSRET stay in generated code.
        const GATES = 1 << 3;
        /// Instructions that are the same for the host are copied.
        const SAME = 1 << 4;
        /// Blocks end where others begin.
        const JOINS = 1 << 5;
        /// Code at another address is copied, or changed where it is.
        const COPIES = 1 << 6;
        /// Jump caches are filled by pages.
        const PAGES = 1 << 7;
        /// Neighbours of a page, and pages after a page fault, are entered in the software TLB.
        const NEIGHBOURS = 1 << 8;
        /// Pages across whose border accesses go get a mapping of both.
        const PAIRS = 1 << 9;
        /// Helpers whose instruction went elsewhere go on in generated code past the dispatcher.
        const RESUME = 1 << 10;
        /// User code that computes is left to the processor.
        const DIRECT = 1 << 11;
        /// Pages with instructions that the processor must not execute are shown to it in pieces.
        const PIECES = 1 << 12;
    }
}

/// A list that names no optimizations.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{word:?} is no optimization; known are {}", Optimizations::names().join(", "))]
pub struct UnknownOptimization {
    word: String,
}

impl Default for Optimizations {
    fn default() -> Self {
        Self::all()
    }
}

impl Optimizations {
    /// Their names, as in lists.
    #[must_use]
    pub fn names() -> Vec<String> {
        Self::all().iter_names().map(|(name, _)| name.to_lowercase()).collect()
    }
}

/// A list of names separated by commas, each with or without `no-`, applied to all of them; or to
/// none, if `none` is the first.
impl FromStr for Optimizations {
    type Err = UnknownOptimization;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut chosen = Self::all();
        for (n, word) in text.split(',').enumerate() {
            if n == 0 && (word == "none" || word == "all") {
                chosen = if word == "none" { Self::empty() } else { Self::all() };
                continue;
            }
            let (name, on) = word.strip_prefix("no-").map_or((word, true), |name| (name, false));
            let one = Self::all().iter_names().find(|(known, _)| known.to_lowercase() == name);
            let Some((_, one)) = one else {
                return Err(UnknownOptimization { word: word.to_owned() });
            };
            chosen.set(one, on);
        }
        Ok(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::Optimizations;

    #[test]
    fn lists_are_understood() {
        let parse = |text: &str| text.parse::<Optimizations>();
        let all = Optimizations::all();
        assert_eq!(parse("all").unwrap(), all);
        assert_eq!(parse("none,shared,same").unwrap(), Optimizations::SHARED | Optimizations::SAME);
        assert_eq!(parse("no-gates").unwrap(), all - Optimizations::GATES);
        for wrong in ["", "shared,", "fast", "no-none", "shared,none"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("neighbours"), "{error}");
        }
    }
}
