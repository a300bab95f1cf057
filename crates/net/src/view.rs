//! What the servers of a network know of it.

use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError, RwLock};

use crate::subnet::Subnet;

/// A hardware address.
pub type Mac = [u8; 6];

/// What there is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The network's name, which is the domain of the names in it.
    pub network: String,
    /// Its addresses.
    pub subnet: Subnet,
    /// Nothing leads out of it.
    pub internal: bool,
    /// Who is in it.
    pub hosts: Vec<Host>,
}

/// A member of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name, a single label.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
    /// Its address.
    pub address: Ipv4Addr,
    /// It runs: its name resolves.
    pub is_up: bool,
}

/// A view that changes under the servers that use it.
#[derive(Clone, Debug)]
pub(crate) struct Shared(Arc<RwLock<View>>);

impl Shared {
    pub(crate) fn new(view: View) -> Self {
        Self(Arc::new(RwLock::new(view)))
    }

    pub(crate) fn set(&self, view: View) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = view;
    }

    /// Looks at it; short.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&View) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}
