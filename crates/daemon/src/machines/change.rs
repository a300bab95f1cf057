//! Changes of what a machine is made of: of its `vm.toml`, which the next start reads.

use std::sync::Arc;

use berth_api::v1::change::ChangeMachine;
use berth_api::v1::event::EventKind;
use berth_api::v1::machine::{MachineConfig, MachineState};

use crate::failure::{Result, conflict, failed, invalid};
use crate::machines::create::check;
use crate::machines::{Entry, Machines};

impl Machines {
    /// Changes what a machine is made of from its next start on; one that runs goes on as it is.
    ///
    /// # Errors
    /// It makes no sense, or the machine is suspended and what is stored of it fixes that.
    pub async fn change(&self, entry: &Arc<Entry>, change: ChangeMachine) -> Result<()> {
        let _changing = entry.changing.lock().await;
        let name = entry.name();
        if change.is_empty() {
            return Err(invalid(format!("nothing of {name} is to be changed")));
        }
        let state = entry.state();
        if state == MachineState::Suspended
            && let Some(what) = fixed(&change)
        {
            return Err(conflict(format!(
                "{name} is suspended, and goes on with the {what} that it had; start it and stop it \
                 first"
            )));
        }
        if let Some(net) = &change.net {
            self.check_network(net).await?;
        }
        let changed = Arc::clone(entry);
        let work = move || {
            let folder = changed.folder();
            // The process of one that runs has it; nobody else changes the folder then.
            let _lock = if state.is_up() { None } else { Some(folder.lock()?) };
            // With what somebody wrote into it since.
            let mut config = folder.config()?;
            if config.id != changed.id {
                let name = changed.name();
                return Err(conflict(format!("the folder of {name} is another machine's now")));
            }
            apply(&mut config.machine, change);
            check(&config.machine)?;
            folder.write_config(&config)?;
            changed.live().config = config;
            Ok(())
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| failed(&error))??;
        if !state.is_up() {
            self.join_network(entry).await?;
        }
        self.tell(EventKind::Changed, entry, None);
        Ok(())
    }
}

/// What is part of a stored machine and not to be changed then. What runs its instructions is not.
fn fixed(change: &ChangeMachine) -> Option<&'static str> {
    let all = [
        (change.cpus.is_some(), "number of processors"),
        (change.memory.is_some(), "memory"),
        (change.cpu.is_some(), "processor"),
        (change.net.is_some(), "network card"),
        (change.debug_exit.is_some(), "debug-exit port"),
    ];
    all.into_iter().find_map(|(asked, what)| asked.then_some(what))
}

fn apply(config: &mut MachineConfig, change: ChangeMachine) {
    let ChangeMachine { cpus, memory, accel, cpu, append, net, ports, debug_exit, env } = change;
    config.cpus = cpus.unwrap_or(config.cpus);
    config.memory = memory.unwrap_or(config.memory);
    config.accel = accel.unwrap_or(config.accel);
    config.cpu = cpu.unwrap_or(config.cpu);
    config.debug_exit = debug_exit.unwrap_or(config.debug_exit);
    if let Some(append) = append {
        config.append = append;
    }
    if let Some(net) = net {
        config.net = net;
    }
    if let Some(ports) = ports {
        config.ports = ports;
    }
    for (name, value) in env {
        match value {
            Some(value) => drop(config.env.insert(name, value)),
            None => drop(config.env.remove(&name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_absent_stays() {
        let mut config = MachineConfig { append: "quiet".into(), ..MachineConfig::default() };
        config.env.insert("A".into(), "1".into());
        let change = |text: &str| serde_json::from_str::<ChangeMachine>(text).unwrap();
        apply(&mut config, change(r#"{"cpus":4,"env":{"A":null,"B":"2"}}"#));
        assert_eq!((config.cpus, config.append.as_str()), (4, "quiet"));
        assert_eq!(config.env.into_iter().collect::<Vec<_>>(), [("B".into(), "2".into())]);
        assert!(change("{}").is_empty() && !change(r#"{"append":""}"#).is_empty());
        assert_eq!(fixed(&change(r#"{"append":"x","env":{"A":"b"}}"#)), None);
        assert_eq!(fixed(&change(r#"{"memory":"1G"}"#)), Some("memory"));
        assert_eq!(fixed(&change(r#"{"accel":"kvm"}"#)), None);
        assert_eq!(fixed(&change(r#"{"cpu":"x86-64-v3"}"#)), Some("processor"));
    }
}
