//! The freeze trap: through it the guest says where its identity is to be written, that it has reached its freeze
//! point, and that it is done. The registers are in [`picovm_guest_protocol::trap`].

use picovm_guest_protocol::trap::{
    BASE, FREEZE, IDENTITY_PAGE, IDENTITY_PAGES_MAX, IDENTITY_RESET, MAGIC, MAGIC_VALUE, PAGE_SIZE,
    POWER_OFF, VERSION,
};
use serde::{Deserialize, Serialize};

/// What the machine is to do after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrapAction {
    /// Nothing: go on.
    Continue,
    /// The guest stands at its freeze point once this access is completed.
    FreezePoint,
    /// The guest has powered itself off.
    PowerOff,
}

/// What is saved of the trap: guest-physical addresses of the identity area's pages, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrapState {
    /// Page-aligned; they may lie outside guest memory, which shows when an identity is written.
    pub identity_pages: Vec<u64>,
}

/// The trap.
#[derive(Default)]
pub struct Trap {
    state: TrapState,
    stop_at_base: bool,
}

impl Trap {
    /// A trap as it was saved.
    #[must_use]
    pub fn from_state(state: &TrapState) -> Self {
        Self {
            state: state.clone(),
            stop_at_base: false,
        }
    }

    /// A trap that stops the machine at the base freeze point too.
    #[must_use]
    pub fn with_base() -> Self {
        Self {
            stop_at_base: true,
            ..Self::default()
        }
    }

    /// What a clone needs of it.
    #[must_use]
    pub fn state(&self) -> TrapState {
        self.state.clone()
    }

    /// A read by the guest at an offset into the page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Ok(bytes) = <&mut [u8; 4]>::try_from(data) {
            *bytes = match offset {
                MAGIC => MAGIC_VALUE,
                VERSION => picovm_guest_protocol::PROTOCOL_VERSION,
                _ => 0,
            }
            .to_le_bytes();
        }
    }

    /// A write by the guest at an offset into the page.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> TrapAction {
        match (offset, data.len()) {
            (IDENTITY_PAGE, 8) => {
                let address = data.try_into().map_or(u64::MAX, u64::from_le_bytes);
                if address.is_multiple_of(PAGE_SIZE as u64)
                    && self.state.identity_pages.len() < IDENTITY_PAGES_MAX
                {
                    self.state.identity_pages.push(address);
                }
                TrapAction::Continue
            }
            (IDENTITY_RESET, 4) => {
                self.state.identity_pages.clear();
                TrapAction::Continue
            }
            (FREEZE, 4) => TrapAction::FreezePoint,
            (BASE, 4) if self.stop_at_base => TrapAction::FreezePoint,
            (POWER_OFF, 4) => TrapAction::PowerOff,
            _ => TrapAction::Continue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_pages_are_kept_in_order_up_to_the_limit() {
        let mut trap = Trap::default();
        assert_eq!(
            trap.write(IDENTITY_PAGE, &0x5001u64.to_le_bytes()),
            TrapAction::Continue
        );
        for page in 0..2 * IDENTITY_PAGES_MAX as u64 {
            trap.write(IDENTITY_PAGE, &(page << 12).to_le_bytes());
        }
        let pages = trap.state().identity_pages;
        assert_eq!(pages.len(), IDENTITY_PAGES_MAX);
        assert_eq!(&pages[..2], [0, 0x1000]);
        trap.write(IDENTITY_RESET, &[0; 4]);
        assert_eq!(trap.state(), TrapState::default());
    }

    #[test]
    fn the_base_freeze_point_stops_only_a_machine_that_wants_a_template_there() {
        let mut trap = Trap::with_base();
        assert_eq!(trap.write(BASE, &[0; 4]), TrapAction::FreezePoint);
        assert_eq!(trap.write(BASE, &[0; 8]), TrapAction::Continue);
        let mut clone = Trap::from_state(&trap.state());
        assert_eq!(clone.write(BASE, &[0; 4]), TrapAction::Continue);
        assert_eq!(Trap::default().write(BASE, &[0; 4]), TrapAction::Continue);
    }

    #[test]
    fn the_freeze_register_takes_its_own_width_only() {
        let mut trap = Trap::default();
        assert_eq!(trap.write(FREEZE, &[1; 4]), TrapAction::FreezePoint);
        assert_eq!(trap.write(FREEZE, &[1; 1]), TrapAction::Continue);
        assert_eq!(trap.write(0xfff, &[1; 8]), TrapAction::Continue);
    }
}
