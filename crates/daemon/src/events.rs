//! Tells whoever listens what happens to machines.

use berth_api::v1::event::{Event, EventKind};
use jiff::Timestamp;
use tokio::sync::broadcast;
use uuid::Uuid;

/// Events kept for a listener that is slow; it is told when it missed some.
const KEPT: usize = 1024;

/// Where events go.
#[derive(Clone, Debug)]
pub struct Events(broadcast::Sender<Event>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::Sender::new(KEPT))
    }
}

impl Events {
    /// Something happened.
    pub fn tell(&self, kind: EventKind, machine: &str, id: Uuid, detail: Option<String>) {
        tracing::info!(machine, %id, ?kind, detail, "event");
        let event = Event { time: Timestamp::now(), kind, machine: machine.to_owned(), id, detail };
        // Nobody has to listen.
        let _ = self.0.send(event);
    }

    /// Everything from now on.
    #[must_use]
    pub fn listen(&self) -> broadcast::Receiver<Event> {
        self.0.subscribe()
    }
}
