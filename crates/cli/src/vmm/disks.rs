//! The disks of a machine that runs, frozen together.

use berth_api::v1::machine::MachineConfig;
use berth_daemon::failure::chain;
use berth_daemon::snapshot::new_layers;
use berth_vmm::devices::HostEnds;
use berth_vmm::virtio::block::live::{DiskSwitch, Prepared};

/// Disks that are ready to be frozen.
pub(super) struct Disks {
    ready: Vec<(DiskSwitch, Prepared)>,
    layers: Vec<Option<String>>,
}

/// Disks that were frozen.
pub(super) struct FrozenDisks {
    switches: Vec<DiskSwitch>,
    /// The layer of each disk; nothing for one that is not written.
    pub(super) layers: Vec<Option<String>>,
}

impl Disks {
    /// Does all that can be done while the guest runs.
    pub(super) fn prepare(config: &MachineConfig, ends: &HostEnds) -> Result<Self, String> {
        let layers = new_layers(config).map_err(|error| chain(&error))?;
        let switches = ends.disks.get().map_or(&[][..], Vec::as_slice);
        let mut ready = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            let Some(layer) = layer else { continue };
            let switch = switches.get(index).and_then(Option::as_ref);
            let switch = switch.ok_or_else(|| format!("disk {index} cannot be frozen"))?;
            let prepared = switch.prepare(layer).map_err(|error| chain(&error))?;
            ready.push((switch.clone(), prepared));
        }
        Ok(Self { ready, layers })
    }

    /// At one instant, while the guest stands still. After an error some may be frozen, which changes
    /// nothing for the guest.
    pub(super) fn freeze(self) -> Result<FrozenDisks, String> {
        let mut switches = Vec::new();
        for (switch, prepared) in self.ready {
            prepared.freeze().map_err(|error| chain(&error))?;
            switches.push(switch);
        }
        Ok(FrozenDisks { switches, layers: self.layers })
    }
}

impl FrozenDisks {
    /// Gets the layers into their files, for others to read, and lets them last later on.
    pub(super) fn write_out(&self) -> Result<(), String> {
        for switch in &self.switches {
            let written = switch.write_out();
            written.map_err(|error| format!("writing a frozen disk out failed: {error}"))?;
        }
        let switches = self.switches.clone();
        let thread = std::thread::Builder::new().name("settle".into());
        // Whoever flushes the disk does so first, and says what fails.
        let _ = thread.spawn(move || switches.iter().for_each(|switch| drop(switch.settle())));
        Ok(())
    }

    /// Waits until the layers are in their files, for others to read, and would survive a loss of
    /// power.
    pub(super) fn settle(&self) -> Result<(), String> {
        for switch in &self.switches {
            let settled = switch.settle();
            settled.map_err(|error| format!("writing a frozen disk out failed: {error}"))?;
        }
        Ok(())
    }
}
