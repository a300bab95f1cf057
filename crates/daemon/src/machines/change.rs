//! Changes of what a machine is made of: of its `vm.toml`, which the next start reads, and at once of the
//! machine that runs, where that can be.

use std::sync::Arc;
use std::time::Duration;

use berth_api::v1::change::{ChangeMachine, Later};
use berth_api::v1::event::EventKind;
use berth_api::v1::machine::{MachineConfig, MachineState};
use berth_api::vmm::{RESIZE_TIME, Request};

use crate::failure::{Result, blocking, chain, conflict, invalid};
use crate::machines::create::check;
use crate::machines::{Entry, Machines};
use crate::vmm::{self, VmmError};

/// How long the process of a machine, and its guest, may take.
const NOW_TIME: Duration = RESIZE_TIME.saturating_add(Duration::from_secs(10));

impl Machines {
    /// Changes what a machine is made of from its next start on, and as far as possible at once if it
    /// runs. Gives what is changed later.
    ///
    /// # Errors
    /// It makes no sense, or the machine is suspended and what is stored of it fixes that.
    pub async fn change(&self, entry: &Arc<Entry>, change: ChangeMachine) -> Result<Vec<Later>> {
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
        let (changed, wanted) = (Arc::clone(entry), change.clone());
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
        blocking(work).await?;
        let later = match state.is_up() {
            true => change_now(entry, &wanted).await,
            false => {
                self.join_network(entry).await?;
                Vec::new()
            }
        };
        self.tell(EventKind::Changed, entry, None);
        Ok(later)
    }
}

/// Changes a machine that runs. Gives what cannot be changed as long as it does.
async fn change_now(entry: &Entry, change: &ChangeMachine) -> Vec<Later> {
    let folder = entry.folder();
    let mut later: Vec<Later> = fixed_at_start(change)
        .into_iter()
        .map(|what| Later {
            what: what.into(),
            why: "it is fixed when a machine is started".into(),
        })
        .collect();
    let mut note = |what: &str, done: std::result::Result<(), VmmError>| {
        if let Err(error) = done {
            later.push(Later { what: what.into(), why: chain(&error) });
        }
    };
    if let Some(count) = change.cpus {
        note("cpus", vmm::ask_within(&folder, &Request::Cpus { count }, NOW_TIME).await);
    }
    let mut given = true;
    if let Some(memory) = change.memory {
        let bytes = memory.bytes();
        let asked = vmm::ask_within(&folder, &Request::Memory { bytes }, NOW_TIME).await;
        given = asked.is_ok();
        note("memory", asked);
    }
    // After the guest has given memory back: else it would end the machine.
    if change.memory_limit.is_some() && !given {
        let why = "the guest has not given its memory back; set them again when it has".into();
        later.push(Later { what: "limits".into(), why });
    } else if change.cpu_limit.is_some() || change.memory_limit.is_some() {
        let limits = entry.limits();
        let group = entry.live().group.clone();
        let limited = tokio::task::spawn_blocking(move || match group {
            Some(group) => group.limit(limits),
            None => Err("it runs without a control group".into()),
        });
        if let Err(why) = limited.await.unwrap_or_else(|error| Err(error.to_string())) {
            later.push(Later { what: "limits".into(), why });
        }
    }
    later
}

/// What of a change waits for the next start in any case, by the names of its fields.
fn fixed_at_start(change: &ChangeMachine) -> Vec<&'static str> {
    let all = [
        (change.accel.is_some(), "accel"),
        (change.cpu.is_some(), "cpu"),
        (change.append.is_some(), "append"),
        (change.net.is_some(), "net"),
        (change.ports.is_some(), "ports"),
        (change.debug_exit.is_some(), "debug_exit"),
        (!change.env.is_empty(), "env"),
    ];
    all.into_iter().filter_map(|(asked, what)| asked.then_some(what)).collect()
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
    let ChangeMachine {
        cpus,
        memory,
        cpu_limit,
        memory_limit,
        accel,
        cpu,
        append,
        net,
        ports,
        debug_exit,
        env,
    } = change;
    if let Some(limit) = cpu_limit {
        config.cpu_limit = Some(limit).filter(|limit| limit.thousandths() > 0);
    }
    if let Some(limit) = memory_limit {
        config.memory_limit = Some(limit).filter(|limit| limit.bytes() > 0);
    }
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
        let mut limited = MachineConfig::default();
        apply(&mut limited, change(r#"{"cpu_limit":1.5,"memory_limit":"1G"}"#));
        let limits = (limited.cpu_limit.map(|limit| limit.thousandths()), limited.memory_limit);
        assert_eq!(limits, (Some(1500), Some((1u64 << 30).into())));
        apply(&mut limited, change(r#"{"cpu_limit":0,"memory_limit":0}"#));
        assert_eq!(limited, MachineConfig::default());
        assert_eq!(fixed(&change(r#"{"append":"x","env":{"A":"b"}}"#)), None);
        assert_eq!(fixed(&change(r#"{"memory":"1G"}"#)), Some("memory"));
        assert_eq!(fixed(&change(r#"{"accel":"kvm"}"#)), None);
        assert_eq!(fixed(&change(r#"{"cpu":"x86-64-v3"}"#)), Some("processor"));
    }
}
