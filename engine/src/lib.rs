//! Containers as clones: the store of images and templates, and running a container in a clone of its own.
//!
//! ```no_run
//! use picovm_engine::{Container, ContainerOptions, Stdio, Store, TemplateSpec};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let store = Store::open_default()?;
//! let image = store.image("debian")?;
//! let template = store.template(&TemplateSpec::new(image), &mut |progress| eprintln!("{progress}"))?;
//! let container = Container::start(&template, &ContainerOptions::command(["uname", "-a"]))?;
//! let exit = container.attach(Stdio::inherit(), &mut |_| None)?;
//! std::process::exit(exit.shell_status().into());
//! # }
//! ```

mod attach;
mod children;
mod confinement;
mod container;
pub mod containers;
mod density;
mod error;
pub mod figures;
mod fork_server;
mod forked;
mod guest;
mod images;
mod maker;
#[cfg(fuzzing)]
pub mod messages;
#[cfg(not(fuzzing))]
mod messages;
mod pool;
mod pools;
mod printable;
mod running;
mod scheduling;
mod serve;
mod session;
mod share;
mod store;
mod streams;
mod templates;
pub mod timeout;
mod vmm_process;
pub mod volumes;
mod warm;
mod warming;
mod working_set;

pub use attach::{Interruption, Stdio, Wake};
pub use confinement::Confinement;
pub use container::{Container, ContainerOptions};
pub use density::{Density, DensityPoint, DensityProgress};
pub use error::EngineError;
pub use fork_server::serve as serve_pool;
pub use guest::GuestFiles;
pub use images::{
    Collected, Commit, Digest, Healthcheck, History, Image, ImageActivity, ImageConfig, ImageName,
    ImagesError, LoadOptions, LoadSource, Overrides, Platform, Removed, RootFs, RunConfig,
};
#[cfg(feature = "registry")]
pub use images::{PullError, PullOptions, Pulled};
pub use maker::{MAKE_TEMPLATE, serve as serve_maker};
pub use messages::Parking;
pub use picovm_guest_protocol::{
    Change, ChangeKind, ContainerExit, Helper, Limits, PathStatus, ProcessSpec, StartFailure, Task,
    TerminalSize, Usage,
};
pub use picovm_rootfs::image::{Limits as ImageLimits, Progress as ImageProgress};
pub use pool::{POOL_MAX, Pool, VMM_VARIABLE};
pub use pools::{KEEP_POOL, Pools, StandingPool, serve as keep_pool};
pub use printable::{printable, printable_lines, printable_text};
pub use running::{News, RunningContainer};
pub use scheduling::Prompt;
pub use session::{Event, Session};
pub use share::Shared;
pub use store::Store;
pub use templates::{StoredTemplate, TemplateProgress, TemplateSpec};
pub use vmm_process::waits_for_order;
pub use warm::WarmSpec;
pub use warming::Until;
