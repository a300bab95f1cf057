//! Names of interfaces and of the table of rules, derived from the state directory, so that daemons of
//! several directories keep out of each other's way, and one that comes again knows what is its.
//!
//! ```text
//! bt 1a2b3 n 4c5d6e7    a bridge: state directory, n, network
//! bt 1a2b3 t 4c5d6e7    a tap interface: state directory, t, member
//! ```

use std::path::Path;

use sha2::{Digest, Sha256};
use uuid::Uuid;

/// Characters of a state directory in names of interfaces, which have 15 at most.
const ROOT_CHARS: usize = 5;
/// Characters of a network or a member.
const OWN_CHARS: usize = 7;

const _: () = assert!(2 + ROOT_CHARS + 1 + OWN_CHARS <= 15);

/// What distinguishes a state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootId(String);

impl RootId {
    /// Of a path without links in it.
    #[must_use]
    pub fn of(root: &Path) -> Self {
        Self(digits(root.as_os_str().as_encoded_bytes(), 8))
    }

    /// The table of rules.
    #[must_use]
    pub fn table(&self) -> String {
        format!("berth-{}", self.0)
    }

    /// How names of bridges begin.
    #[must_use]
    pub fn bridges(&self) -> String {
        self.prefix('n')
    }

    /// The bridge of a network.
    #[must_use]
    pub fn bridge(&self, network: Uuid) -> String {
        self.prefix('n') + &digits(network.as_bytes(), OWN_CHARS)
    }

    /// The tap interface of a member.
    #[must_use]
    pub fn tap(&self, member: Uuid) -> String {
        self.prefix('t') + &digits(member.as_bytes(), OWN_CHARS)
    }

    fn prefix(&self, kind: char) -> String {
        format!("bt{}{kind}", self.0.get(..ROOT_CHARS).unwrap_or(&self.0))
    }
}

fn digits(bytes: &[u8], count: usize) -> String {
    let mut text: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    text.truncate(count);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let (one, two) = (RootId::of(Path::new("/a")), RootId::of(Path::new("/b")));
        let (x, y) = (Uuid::from_u128(1), Uuid::from_u128(2));
        assert_eq!(one.bridge(x).len(), 15);
        assert_eq!(one.bridge(x), one.bridge(x));
        let all = [one.bridge(x), one.bridge(y), one.tap(x), two.bridge(x)];
        for (index, name) in all.iter().enumerate() {
            assert!(!all[..index].contains(name));
            assert_eq!(name.starts_with(&one.bridges()), index < 2, "{name}");
        }
        assert_ne!(one.table(), two.table());
    }
}
