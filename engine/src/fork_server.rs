//! The fork server of a pool: it opens a template once and then only forks. A VMM process is a `fork(2)` of a process that has
//! everything open, and no `execve(2)`.
//!
//! One VMM process is always forked ahead of the order for it, where there is time: it is jailed, has its threads and waits. So the
//! jail is not on the path of a cold start either.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use picovm_vmm::Template;

use crate::children::{self, Asked, Children};
use crate::confinement::{Confinement, Forker, VmmProcess};
use crate::error::EngineError;
use crate::messages::{self, FromVmm, ToServer};
use crate::vmm_process;

/// How long nobody has ordered a clone when the next process is forked ahead: that would hold up the start that comes of an order,
/// and what comes of a clone that was parked by it, which take some 40 ms.
const QUIET: Duration = Duration::from_millis(100);

/// Serves a pool of one template: has a VMM process park a clone whenever the pool asks for one, until the pool closes `control`;
/// then it waits for the last of them.
///
/// To be called by a process that has one thread and nothing else to do: `picovm-vmm`.
///
/// # Errors
/// [`EngineError::Template`] if the template cannot be opened; [`EngineError::Jail`]; [`EngineError::Host`].
pub fn serve(template: &Path, control: UnixStream, confinement: Confinement) -> Result<(), EngineError> {
    // Out of the terminal's process group: Ctrl-C is for who uses the pool.
    let _ = rustix::process::setsid();
    children::raise_open_files();
    let mut server = match ForkServer::new(template, confinement) {
        Ok(server) => server,
        Err(error) => {
            let _ = messages::send(&control, &FromVmm::Failed(error.to_string()), &[]);
            return Err(error);
        }
    };
    server.control = Some(control);
    server.run()
}

struct ForkServer {
    template: Template,
    forker: Forker,
    /// The pool's, until that closes it.
    control: Option<UnixStream>,
    children: Children,
    /// The one that is forked ahead.
    ahead: Option<Ahead>,
}

/// A VMM process that waits for its order.
struct Ahead {
    process: VmmProcess,
    orders: UnixStream,
}

impl ForkServer {
    fn new(template: &Path, confinement: Confinement) -> Result<Self, EngineError> {
        let template = Template::open(template)?;
        let mut forker = Forker::new(&template, None, confinement)?;
        forker.become_server()?;
        Ok(Self {
            template,
            forker,
            control: None,
            children: Children::default(),
            ahead: None,
        })
    }

    fn run(&mut self) -> Result<(), EngineError> {
        // When one is forked ahead, if none is.
        let mut due = None;
        loop {
            let asked = self
                .children
                .wait(self.control.as_ref(), due)
                .map_err(EngineError::host("wait for the pool"))?;
            match asked {
                Asked::Pool => due = self.hear()?,
                Asked::Time => {
                    due = None;
                    // Should this fail, the next order shows it.
                    self.ahead = self.fork().ok();
                }
                Asked::Nothing if self.control.is_none() && self.children.is_empty() => return Ok(()),
                Asked::Nothing => {}
            }
        }
    }

    /// Does what the pool asks for; gives when a process is to be forked ahead.
    fn hear(&mut self) -> Result<Option<Instant>, EngineError> {
        let told = match &self.control {
            Some(control) => {
                messages::receive(control).map_err(EngineError::host("receive from the pool"))?
            }
            None => None,
        };
        let Some((order, descriptors)) = told else {
            self.control = None;
            if let Some(ahead) = self.ahead.take() {
                ahead.end();
            }
            return Ok(None);
        };
        if let Some(socket) = descriptors.into_iter().next() {
            self.order(&order, UnixStream::from(socket));
        }
        Ok(Instant::now().checked_add(QUIET).filter(|_| self.ahead.is_none()))
    }

    /// Hands an order to the process that waits for one, or to a new one.
    fn order(&mut self, order: &ToServer, socket: UnixStream) {
        let ahead = self
            .ahead
            .take()
            .and_then(|ahead| ahead.obey(order, &socket).ok());
        let ordered = match ahead {
            Some(process) => Ok(process),
            // There is none, or somebody has killed it.
            None => self.fork().and_then(|ahead| ahead.obey(order, &socket)),
        };
        match ordered {
            Ok(process) => self.children.push(process, socket),
            Err(error) => {
                // Without the answer the pool sees that the socket is closed.
                let _ = messages::send(&socket, &FromVmm::Failed(error.to_string()), &[]);
            }
        }
    }

    fn fork(&mut self) -> Result<Ahead, EngineError> {
        let (ours, theirs) = UnixStream::pair().map_err(EngineError::host("create a socket pair"))?;
        let mut ours = Some(ours);
        let Self {
            template,
            forker,
            control,
            children,
            ..
        } = self;
        let process = forker.fork(template, &[theirs.as_fd(), rustix::stdio::stderr()], |filters| {
            // Copies, which a jail has closed. By the end of each somebody is told that a process has ended, which this one must
            // not hold up: the server, by the pool and by this process, and its children, by those who use them.
            ours = None;
            *control = None;
            children.leave();
            vmm_process::wait_and_run(template, &theirs, filters);
        })?;
        let orders =
            ours.ok_or_else(|| EngineError::host("fork a VMM process")(io::ErrorKind::NotConnected.into()))?;
        Ok(Ahead { process, orders })
    }
}

impl Ahead {
    /// Gives it its order.
    fn obey(self, order: &ToServer, socket: &UnixStream) -> Result<VmmProcess, EngineError> {
        match messages::send(&self.orders, order, &[socket.as_fd()]) {
            Ok(()) => Ok(self.process),
            Err(error) => {
                self.end();
                Err(EngineError::host("give a VMM process its order")(error))
            }
        }
    }

    /// Ends one that waits for its order.
    fn end(self) {
        self.process.kill();
        self.process.wait();
    }
}
