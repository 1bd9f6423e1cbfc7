//! Devices from the guest's side: what the transport promises, well-formed requests, and drivers that do as they like.

mod driver;
mod fs;
mod hostile;
mod round_trips;
mod storage;
mod transport;
