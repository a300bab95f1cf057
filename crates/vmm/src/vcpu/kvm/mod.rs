//! The KVM processor: a machine with KVM's interrupt controllers and timers, whose port and MMIO
//! accesses go to the same buses as those of a translated one.

mod chips;
mod convert;
pub mod vm;

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use berth_x86::CpuState;
use kvm_ioctls::{VcpuExit as KvmExit, VcpuFd};

use crate::bus::Bus;
use crate::clock::Clock;
use crate::vcpu::kvm::convert::Timing;
use crate::vcpu::{Capabilities, Inside, Vcpu, VcpuError, VcpuExit, VcpuHandle};

/// The signal that brings a vCPU thread out of KVM; its handler does nothing.
fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 1
}

extern "C" fn do_nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let signal = kick_signal();
        if let Err(error) = vmm_sys_util::signal::register_signal_handler(signal, do_nothing) {
            tracing::error!(%error, "vCPUs of KVM cannot be interrupted");
        }
    });
}

/// Where to reach a vCPU.
struct Target {
    /// `immediate_exit` of the shared page: KVM does not enter the guest while it is set.
    immediate_exit: *const AtomicU8,
    thread: Option<libc::pid_t>,
}

// SAFETY: the pointer is only used for atomic stores, and only while the vCPU lives: dropping it
// takes the target away under the same lock.
unsafe impl Send for Target {}

struct Handle {
    kicked: AtomicBool,
    target: Mutex<Option<Target>>,
}

impl VcpuHandle for Handle {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(target) = &*target else { return };
        // SAFETY: the page is mapped as long as the target is there; the field is one byte.
        unsafe { &*target.immediate_exit }.store(1, Ordering::SeqCst);
        if let Some(thread) = target.thread {
            // SAFETY: signals a thread of this process by number; one that has gone is an error
            // without effects.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
    }

    fn interrupt(&self) {
        // Interrupts are KVM's own affair.
    }

    fn nmi(&self) {
        // So are these.
    }
}

/// A vCPU of KVM.
pub struct KvmVcpu {
    index: u32,
    fd: VcpuFd,
    mmio: Arc<Bus>,
    ports: Arc<Bus>,
    handle: Arc<Handle>,
    irqchip: bool,
    clock: Arc<dyn Clock>,
    /// How fast the guest's time-stamp counter counts.
    tsc_hz: u64,
    /// What an access asked for was done, and KVM has not finished the instruction.
    unfinished: bool,
    /// The timer of the APIC counted down when that was last looked at; the vCPU has not run since.
    timer_ran: bool,
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        *self.handle.target.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What an exit left to do after the borrow of the shared page ended.
enum Next {
    Continue,
    /// An access was done; KVM finishes its instruction when it runs next.
    Accessed,
    Return(VcpuExit),
    GiveUp(String),
}

impl KvmVcpu {
    fn new(
        index: u32,
        mut fd: VcpuFd,
        (mmio, ports): (Arc<Bus>, Arc<Bus>),
        irqchip: bool,
        clock: Arc<dyn Clock>,
        tsc_hz: u64,
    ) -> Self {
        install_handler();
        let immediate_exit = (&raw const fd.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        let target = Mutex::new(Some(Target { immediate_exit, thread: None }));
        let handle = Arc::new(Handle { kicked: AtomicBool::new(false), target });
        let (unfinished, timer_ran) = (false, false);
        Self { index, fd, mmio, ports, handle, irqchip, clock, tsc_hz, unfinished, timer_ran }
    }

    /// Gives it what is inside of it besides its registers, which it has already; `now_ns` is the time by
    /// the clock by which that was stored.
    ///
    /// # Errors
    /// [`VcpuError`] when KVM refuses it.
    pub fn set_inside(
        &mut self,
        state: &CpuState,
        inside: &Inside,
        now_ns: u64,
    ) -> Result<(), VcpuError> {
        convert::set_inside(&self.fd, self.index, state, inside, now_ns)
            .map_err(|(operation, error)| self.failed(operation, error))?;
        self.stood_still();
        Ok(())
    }

    fn failed(&self, operation: &'static str, error: kvm_ioctls::Error) -> VcpuError {
        let source = std::io::Error::from_raw_os_error(error.errno());
        VcpuError::Kvm { operation, index: self.index, source }
    }

    /// Takes a kick, if there was one since the last time.
    fn take_kick(&mut self) -> bool {
        let kicked = self.handle.kicked.swap(false, Ordering::SeqCst);
        if kicked {
            let target = self.handle.target.lock().unwrap_or_else(PoisonError::into_inner);
            // A kick that comes now sets the flag again, and is seen next time.
            if !self.handle.kicked.load(Ordering::SeqCst)
                && let Some(target) = &*target
            {
                // SAFETY: as in `kick`.
                unsafe { &*target.immediate_exit }.store(0, Ordering::SeqCst);
            }
        }
        kicked
    }

    /// Lets KVM finish the instruction whose accesses were done, without another one. Before that the
    /// registers are those from before it.
    fn finish(&mut self) -> Result<(), VcpuError> {
        while self.unfinished {
            // As by a kick, which the next run takes.
            self.handle.kick();
            if let Next::GiveUp(why) = self.step()? {
                return Err(self.gave_up(why));
            }
        }
        Ok(())
    }

    fn gave_up(&self, why: String) -> VcpuError {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        VcpuError::KvmGaveUp { index: self.index, rip, why }
    }

    fn step(&mut self) -> Result<Next, VcpuError> {
        self.unfinished = false;
        let next = self.run_once()?;
        self.unfinished = matches!(next, Next::Accessed);
        Ok(next)
    }

    fn run_once(&mut self) -> Result<Next, VcpuError> {
        let (mmio, ports) = (Arc::clone(&self.mmio), Arc::clone(&self.ports));
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Next::Continue);
            }
            Err(error) => return Err(self.failed("KVM_RUN", error)),
        };
        Ok(match exit {
            KvmExit::IoOut(port, data) => {
                let data = data.to_vec();
                for item in data.chunks(self.port_size(data.len())) {
                    ports.write(u64::from(port), item);
                }
                Next::Accessed
            }
            KvmExit::IoIn(port, data) => {
                let (start, len) = (data.as_mut_ptr(), data.len());
                let size = self.port_size(len);
                // SAFETY: the slice was borrowed from the vCPU's shared page, which stays mapped and
                // is not touched by anybody else until the vCPU runs again.
                let data = unsafe { std::slice::from_raw_parts_mut(start, len) };
                for item in data.chunks_mut(size) {
                    ports.read(u64::from(port), item);
                }
                Next::Accessed
            }
            KvmExit::MmioRead(address, data) => {
                mmio.read(address, data);
                Next::Accessed
            }
            KvmExit::MmioWrite(address, data) => {
                mmio.write(address, data);
                Next::Accessed
            }
            KvmExit::Hlt => Next::Return(VcpuExit::Halted),
            KvmExit::Shutdown => Next::Return(VcpuExit::Shutdown),
            KvmExit::Intr | KvmExit::IrqWindowOpen => Next::Continue,
            KvmExit::InternalError => {
                Next::GiveUp("it cannot emulate an instruction (internal error)".into())
            }
            KvmExit::FailEntry(reason, _) => {
                Next::GiveUp(format!("the processor refused its state (reason {reason:#x})"))
            }
            other => Next::GiveUp(format!("it stopped with {other:?}")),
        })
    }

    /// Bytes of one item of a port access; string instructions have several in one exit.
    fn port_size(&mut self, len: usize) -> usize {
        // SAFETY: called only after an exit for port I/O, when `io` is the part of the union that
        // KVM filled.
        let size = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        usize::from(size).clamp(1, len.max(1))
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<VcpuExit, VcpuError> {
        // SAFETY: gettid has no arguments and no memory effects.
        let thread = unsafe { libc::gettid() };
        if let Some(target) =
            &mut *self.handle.target.lock().unwrap_or_else(PoisonError::into_inner)
        {
            target.thread = Some(thread);
        }
        loop {
            if self.take_kick() {
                return Ok(VcpuExit::Kicked);
            }
            self.timer_ran = false;
            match self.step()? {
                Next::Continue | Next::Accessed => {}
                Next::Return(exit) => return Ok(exit),
                Next::GiveUp(why) => return Err(self.gave_up(why)),
            }
        }
    }

    fn stood_still(&mut self) {
        // A guest without this clock has nothing to be told.
        let _ = self.fd.kvmclock_ctrl();
    }

    fn inside(&mut self) -> Result<Option<Inside>, VcpuError> {
        self.finish()?;
        let timing =
            Timing { tsc_hz: self.tsc_hz, now_ns: self.clock.now_ns(), ran: self.timer_ran };
        let inside = convert::get_mp_state(&self.fd)
            .and_then(|mp_state| convert::get_inside(&self.fd, mp_state, timing))
            .map_err(|(operation, error)| self.failed(operation, error))?;
        self.timer_ran = inside.apic.counts_down();
        Ok(Some(inside))
    }

    fn state(&mut self) -> Result<CpuState, VcpuError> {
        self.finish()?;
        convert::get(&self.fd).map_err(|(operation, error)| self.failed(operation, error))
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), VcpuError> {
        convert::set(&self.fd, state).map_err(|(operation, error)| self.failed(operation, error))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "kvm", irqchip_inside: self.irqchip }
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::clone(&self.handle) as Arc<dyn VcpuHandle>
    }
}
