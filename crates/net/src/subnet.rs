//! IPv4 subnets: which addresses they have, and which of them are free.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Fewest and most bits of a network's prefix: 16 million addresses, and 6.
const PREFIX_MIN: u8 = 8;
const PREFIX_MAX: u8 = 29;
/// Where subnets are taken from when none is given: 10.89.0.0/24 up to 10.127.255.0/24.
const POOL_FIRST: Ipv4Addr = Ipv4Addr::new(10, 89, 0, 0);
const POOL_LAST: Ipv4Addr = Ipv4Addr::new(10, 127, 255, 0);
const POOL_PREFIX: u8 = 24;

/// An address and how many of its first bits are the network's: `10.1.2.0/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subnet {
    /// Host bits are zero.
    first: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// The subnet of that length, 0 to 32, that an address is in.
    #[must_use]
    pub fn around(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        Self { first: Ipv4Addr::from(u32::from(address) & mask(prefix)), prefix }
    }

    /// Its first address, which nobody has.
    #[must_use]
    pub fn first(self) -> Ipv4Addr {
        self.first
    }

    /// Bits of the prefix, 0 to 32.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The prefix as `255.255.255.0`.
    #[must_use]
    pub fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from(mask(self.prefix))
    }

    /// Its last address, which means all of them.
    #[must_use]
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.first) | !mask(self.prefix))
    }

    /// The host's address in a network of this subnet: the first that can be had.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.first).saturating_add(1))
    }

    /// Whether an address is in it.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.prefix) == u32::from(self.first)
    }

    /// Whether they have an address in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.first) || other.contains(self.first)
    }

    /// The first address that is neither the gateway's nor one of these.
    #[must_use]
    pub fn free(self, taken: &[Ipv4Addr]) -> Option<Ipv4Addr> {
        let mut taken: Vec<u32> = taken.iter().map(|address| u32::from(*address)).collect();
        taken.sort_unstable();
        let mut candidate = u32::from(self.gateway()).checked_add(1)?;
        for address in taken {
            if address == candidate {
                candidate = candidate.checked_add(1)?;
            }
        }
        (candidate < u32::from(self.broadcast())).then(|| Ipv4Addr::from(candidate))
    }

    /// A subnet of 254 addresses that overlaps none of these.
    #[must_use]
    pub fn choose(taken: &[Self]) -> Option<Self> {
        let step = !mask(POOL_PREFIX) as usize + 1;
        let mut all = (u32::from(POOL_FIRST)..=u32::from(POOL_LAST)).step_by(step);
        all.find_map(|first| {
            let subnet = Self::around(Ipv4Addr::from(first), POOL_PREFIX);
            taken.iter().all(|other| !other.overlaps(subnet)).then_some(subnet)
        })
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = String;

    /// Reads one that a network can have.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let not = |why: &str| Err(format!("`{text}` is no subnet for a network: {why}"));
        let Some((address, prefix)) = text.split_once('/') else {
            return not("10.1.2.0/24 is one");
        };
        let (Ok(address), Ok(prefix)) = (address.parse::<Ipv4Addr>(), prefix.parse::<u8>()) else {
            return not("10.1.2.0/24 is one");
        };
        if !(PREFIX_MIN..=PREFIX_MAX).contains(&prefix) {
            return not(&format!("the prefix has {PREFIX_MIN} to {PREFIX_MAX} bits"));
        }
        let subnet = Self::around(address, prefix);
        if subnet.first != address {
            return not(&format!("{subnet} is meant, perhaps"));
        }
        let special = address.is_loopback()
            || address.is_link_local()
            || address.octets()[0] == 0
            || address.octets()[0] >= 224;
        if special {
            return not("these addresses mean something else");
        }
        Ok(subnet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn what_can_be_a_subnet() {
        let subnet = subnet("10.1.2.0/24");
        assert_eq!(subnet.to_string(), "10.1.2.0/24");
        assert_eq!(subnet.netmask(), Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(subnet.broadcast(), Ipv4Addr::new(10, 1, 2, 255));
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 1, 2, 1));
        for bad in [
            "",
            "10.1.2.0",
            "10.1.2.0/7",
            "10.1.2.0/30",
            "10.1.2.1/24",
            "127.0.0.0/8",
            "224.0.0.0/8",
            "169.254.0.0/16",
            "0.0.0.0/8",
            "10.1.2.0/24/24",
            "fd00::/64",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn subnets_overlap_where_one_has_the_other() {
        let check = |a: &str, b: &str, expected: bool| {
            let (a, b) = (subnet(a), subnet(b));
            assert_eq!((a.overlaps(b), b.overlaps(a)), (expected, expected), "{a} {b}");
        };
        check("10.0.0.0/8", "10.89.3.0/24", true);
        check("10.89.2.0/24", "10.89.3.0/24", false);
        check("10.89.2.0/23", "10.89.3.0/24", true);
    }

    #[test]
    fn addresses_are_given_from_the_first_on() {
        let subnet = subnet("10.1.2.0/29");
        let mut taken = Vec::new();
        while let Some(address) = subnet.free(&taken) {
            assert!(subnet.contains(address) && !taken.contains(&address));
            taken.push(address);
        }
        let expected: Vec<_> = (2..=6).map(|last| Ipv4Addr::new(10, 1, 2, last)).collect();
        assert_eq!(taken, expected);
        taken.remove(2);
        taken.reverse();
        assert_eq!(subnet.free(&taken), Some(Ipv4Addr::new(10, 1, 2, 4)));
        let strange = [Ipv4Addr::new(9, 9, 9, 9), Ipv4Addr::new(10, 1, 2, 1)];
        assert_eq!(subnet.free(&strange), Some(Ipv4Addr::new(10, 1, 2, 2)));
    }

    #[test]
    fn free_subnets_avoid_the_hosts_routes() {
        assert_eq!(Subnet::choose(&[]), Some(subnet("10.89.0.0/24")));
        let taken = [subnet("10.88.0.0/15"), Subnet::around(Ipv4Addr::new(10, 90, 0, 9), 32)];
        assert_eq!(Subnet::choose(&taken), Some(subnet("10.90.1.0/24")));
        assert_eq!(Subnet::choose(&[subnet("10.0.0.0/8")]), None);
    }
}
