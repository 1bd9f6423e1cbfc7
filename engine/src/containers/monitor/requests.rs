//! What clients ask of a monitor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use picovm_guest_protocol::frame::MAIN;

use super::super::protocol::{FromMonitor, ToMonitor};
use super::super::record::Status;
use super::peers::Role;
use super::{KILL, KILL_MAX, Monitor, Purpose, Running};
use crate::error::EngineError;
use crate::messages;

/// An answer to a request; none if it comes later.
type Answer = Result<Option<FromMonitor>, String>;

impl Monitor<'_> {
    /// Takes a request of a client, or sees that it has gone.
    pub(super) fn hear(&mut self, id: u64) {
        let Some(at) = self.peers.iter().position(|peer| peer.id == id) else {
            return;
        };
        let received = self
            .peers
            .get(at)
            .map(|peer| messages::receive::<ToMonitor>(&peer.socket));
        let Some(Ok(Some((message, descriptors)))) = received else {
            // What it had attached goes with it; what it has executed goes on.
            self.peers.remove(at);
            return;
        };
        let answer = match self.obey(id, message, descriptors) {
            Ok(None) => return,
            Ok(Some(answer)) => answer,
            Err(reason) => FromMonitor::Refused(reason),
        };
        if let Some(peer) = self.peers.iter().find(|peer| peer.id == id) {
            peer.tell(&answer);
        }
    }

    fn obey(&mut self, id: u64, message: ToMonitor, descriptors: Vec<OwnedFd>) -> Answer {
        let done = Ok(Some(FromMonitor::Done));
        match message {
            ToMonitor::Attach {
                stdin,
                stdout,
                stderr,
            } => {
                let mut descriptors = descriptors.into_iter();
                let mut next = |wanted: bool| descriptors.next_if_wanted(wanted);
                let (stdin, stdout, stderr) = (next(stdin), next(stdout), next(stderr));
                if let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id) {
                    peer.attach(stdin, stdout, stderr);
                }
                self.containers.tell(&self.record, "attach", &[]);
                done
            }
            ToMonitor::Wait => {
                self.set_role(id, Role::Waiting);
                done
            }
            ToMonitor::Signal(signal) => {
                self.signal(signal)?;
                // Who has attached or waits hears of the end, and of nothing else.
                Ok(None)
            }
            ToMonitor::Stop { signal, timeout } => {
                self.set_role(id, Role::Waiting);
                self.stop(signal, timeout);
                Ok(None)
            }
            ToMonitor::Pause => {
                let running = self.awake()?;
                running.vmm.pause().map_err(told)?;
                running.pausing = Some(id);
                Ok(None)
            }
            ToMonitor::Unpause => {
                if self.record.state.status != Status::Paused {
                    return Err(format!("container {} is not paused", self.record.name));
                }
                let running = self.running()?;
                running.vmm.resume().map_err(told)?;
                running.pausing = Some(id);
                Ok(None)
            }
            ToMonitor::Exec(spec) => {
                let command = spec
                    .args
                    .iter()
                    .map(|arg| String::from_utf8_lossy(arg))
                    .collect::<Vec<_>>()
                    .join(" ");
                self.begin(id, descriptors, |running, process, streams| {
                    running.vmm.exec(process, &spec, streams)
                })?;
                self.containers
                    .tell(&self.record, &format!("exec_start: {command}"), &[]);
                done
            }
            ToMonitor::Help(helper) => {
                self.begin(id, descriptors, |running, process, streams| {
                    running.vmm.help(process, &helper, streams)
                })?;
                done
            }
            ToMonitor::Resize(size) => {
                let process = self.process_of(id);
                if process == MAIN {
                    self.terminal = Some(size);
                }
                if let Some(running) = &self.running {
                    let _ = running.vmm.resize(process, size);
                }
                Ok(None)
            }
            ToMonitor::SignalOwn(signal) => {
                let process = self.process_of(id);
                if let Some(running) = self.running.as_ref().filter(|_| process != MAIN) {
                    let _ = running.vmm.signal_process(process, signal);
                }
                Ok(None)
            }
        }
    }

    fn set_role(&mut self, id: u64, role: Role) {
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id)
            && matches!(peer.role, Role::New)
        {
            peer.role = role;
        }
    }

    fn process_of(&self, id: u64) -> u16 {
        match self
            .peers
            .iter()
            .find(|peer| peer.id == id)
            .map(|peer| &peer.role)
        {
            Some(Role::Executing(process)) => *process,
            _ => MAIN,
        }
    }

    /// The container, if it has a clone.
    fn running(&mut self) -> Result<&mut Running, String> {
        let name = &self.record.name;
        self.running
            .as_mut()
            .filter(|running| running.exit.is_none() && running.gone.is_none())
            .ok_or_else(|| format!("container {name} is not running"))
    }

    /// The container, if it runs and does not stand still.
    fn awake(&mut self) -> Result<&mut Running, String> {
        if self.record.state.status == Status::Paused {
            let name = &self.record.name;
            return Err(format!(
                "container {name} is paused: `picovm unpause {name}` lets it go on"
            ));
        }
        self.running()
    }

    fn signal(&mut self, signal: u8) -> Result<(), String> {
        let stop_signal = self.record.config.stop_signal;
        if signal == KILL || signal == stop_signal {
            // Who ends it does not want it to be started again.
            self.stopping = true;
        }
        if signal == KILL {
            self.killed = true;
            self.force_at = Some(Instant::now() + KILL_MAX);
        }
        let paused = self.record.state.status == Status::Paused;
        let Ok(running) = self.running() else {
            // It is to be started again: that is called off.
            return match self.stopping {
                true => Ok(()),
                false => Err(format!("container {} is not running", self.record.name)),
            };
        };
        if paused && signal == KILL {
            running.vmm.resume().map_err(told)?;
        }
        running.vmm.signal(signal).map_err(told)?;
        self.containers
            .tell(&self.record, "kill", &[("signal", signal.to_string())]);
        Ok(())
    }

    fn stop(&mut self, signal: Option<u8>, timeout: Option<u32>) {
        self.stopping = true;
        let signal = signal.unwrap_or(self.record.config.stop_signal);
        let timeout = timeout.unwrap_or(self.record.config.stop_timeout);
        let paused = self.record.state.status == Status::Paused;
        let Ok(running) = self.running() else { return };
        if paused {
            let _ = running.vmm.resume();
        }
        let _ = running.vmm.signal(signal);
        let at = Instant::now() + Duration::from_secs(timeout.into());
        // The more impatient of two counts.
        self.kill_at = Some(self.kill_at.map_or(at, |other| other.min(at)));
        self.containers
            .tell(&self.record, "kill", &[("signal", signal.to_string())]);
    }

    fn begin(
        &mut self,
        id: u64,
        descriptors: Vec<OwnedFd>,
        send: impl FnOnce(&Running, u16, [BorrowedFd<'_>; 3]) -> Result<(), EngineError>,
    ) -> Result<(), String> {
        let running = self.awake()?;
        let [stdin, stdout, stderr] =
            <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| "a process needs three streams".to_owned())?;
        let process = Self::free_number(running).ok_or("its container has too many processes")?;
        send(running, process, [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]).map_err(told)?;
        running.processes.insert(process, Purpose::Peer(id));
        self.set_role(id, Role::Executing(process));
        Ok(())
    }
}

fn told(error: EngineError) -> String {
    error.to_string()
}

/// Takes the next item only if it is wanted.
trait NextIfWanted: Iterator {
    fn next_if_wanted(&mut self, wanted: bool) -> Option<Self::Item> {
        if wanted { self.next() } else { None }
    }
}

impl<I: Iterator> NextIfWanted for I {}
