//! What makes a clone itself.
//!
//! The host encodes an [`Identity`] into the identity area, pages of guest memory that `init` announced before the
//! freeze, so that the clone's first instructions read it without any device access. The area starts with an 8-byte
//! header: [`AREA_MAGIC`] and the length of the body, both little-endian `u32`; the body is the postcard encoding.
//! A zeroed header means that there is no identity: the machine is the parent going on after a freeze.

use serde::{Deserialize, Serialize};

/// First word of an identity area that holds an identity.
pub const AREA_MAGIC: u32 = u32::from_le_bytes(*b"IDNT");
/// Bytes before the encoded identity.
pub const AREA_HEADER: usize = 8;

/// What makes a clone itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Id of the clone, printable ASCII.
    pub id: String,
    /// Host name, 1 to 64 bytes.
    pub hostname: String,
    /// Fresh random bytes from the host, mixed into the kernel's generator before anything else runs.
    pub entropy: [u8; 32],
    /// The host's `CLOCK_REALTIME` at the fork, in nanoseconds since 1970.
    pub realtime_ns: u64,
    /// What to run. `None`: it did not fit here and comes as the first frame of the control connection
    /// ([`crate::Frame::Spec`]).
    pub container: Option<ContainerSpec>,
}

/// What to run in the clone and how. Strings are bytes, as `execve(2)` has them; none contains a zero byte.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Arguments; the first is the program, looked up in the container's `PATH` when it has no slash.
    pub args: Vec<Vec<u8>>,
    /// Environment as `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// Working directory, absolute; created if it does not exist. Empty: `/`.
    pub cwd: Vec<u8>,
    /// `user[:group]`, each a name from the container's own `/etc/passwd` and `/etc/group` or a number.
    /// Empty: root.
    pub user: Vec<u8>,
    /// Whether standard input is connected. If not, it is `/dev/null`.
    pub stdin: bool,
}

/// Why an identity could not be encoded or decoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdentityError {
    /// The area has no header or a zeroed one.
    #[error("the identity area holds no identity")]
    Absent,
    /// Header or body is not what the host writes.
    #[error("the identity area is damaged: {0}")]
    Damaged(&'static str),
    /// It does not fit.
    #[error("the identity takes {needed} bytes and the identity area has {available}")]
    TooLarge {
        /// Bytes needed, header included.
        needed: usize,
        /// Bytes available.
        available: usize,
    },
}

impl Identity {
    /// Encodes the identity with its header, ready to be copied into an area of `area_size` bytes.
    ///
    /// # Errors
    /// [`IdentityError::TooLarge`] if it does not fit; leave out the container then.
    pub fn encode(&self, area_size: usize) -> Result<Vec<u8>, IdentityError> {
        let body = postcard::to_stdvec(self).map_err(|_| IdentityError::Damaged("it cannot be encoded"))?;
        let needed = body.len().saturating_add(AREA_HEADER);
        if needed > area_size {
            return Err(IdentityError::TooLarge {
                needed,
                available: area_size,
            });
        }
        let length =
            u32::try_from(body.len()).map_err(|_| IdentityError::Damaged("it is longer than 4 GiB"))?;
        Ok([&AREA_MAGIC.to_le_bytes()[..], &length.to_le_bytes(), &body].concat())
    }

    /// Decodes an identity area.
    ///
    /// # Errors
    /// [`IdentityError::Absent`] for a zeroed header, [`IdentityError::Damaged`] for anything that the host did not
    /// write.
    pub fn decode(area: &[u8]) -> Result<Self, IdentityError> {
        let (magic, rest) = area.split_first_chunk::<4>().ok_or(IdentityError::Absent)?;
        let (length, body) = rest.split_first_chunk::<4>().ok_or(IdentityError::Absent)?;
        let length = u32::from_le_bytes(*length) as usize;
        match u32::from_le_bytes(*magic) {
            0 => return Err(IdentityError::Absent),
            AREA_MAGIC => {}
            _ => return Err(IdentityError::Damaged("wrong first word")),
        }
        let body = body
            .get(..length)
            .ok_or(IdentityError::Damaged("it is longer than its area"))?;
        let (identity, rest) =
            postcard::take_from_bytes(body).map_err(|_| IdentityError::Damaged("bad encoding"))?;
        if !rest.is_empty() {
            return Err(IdentityError::Damaged("bytes are left over"));
        }
        Ok(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Identity {
        Identity {
            id: "c1".into(),
            hostname: "box".into(),
            entropy: [7; 32],
            realtime_ns: 1_790_000_000_000_000_000,
            container: Some(ContainerSpec {
                args: vec![b"echo".to_vec(), vec![0xff, 0xfe]],
                env: vec![b"PATH=/bin".to_vec()],
                ..ContainerSpec::default()
            }),
        }
    }

    #[test]
    fn an_identity_survives_the_area() {
        let mut area = sample().encode(4096).unwrap();
        area.resize(4096, 0xaa);
        assert_eq!(Identity::decode(&area).unwrap(), sample());
    }

    #[test]
    fn a_zeroed_area_holds_no_identity() {
        assert_eq!(Identity::decode(&[0; 4096]), Err(IdentityError::Absent));
        assert_eq!(Identity::decode(&[]), Err(IdentityError::Absent));
    }

    #[test]
    fn a_large_container_does_not_fit_and_says_so() {
        let mut identity = sample();
        identity.container.as_mut().unwrap().env = vec![vec![b'x'; 5000]];
        assert!(matches!(
            identity.encode(4096),
            Err(IdentityError::TooLarge { needed, available: 4096 }) if needed > 5000
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_an_error_or_an_identity(mut area in prop::collection::vec(any::<u8>(), 0..600), header in any::<bool>()) {
            if header && area.len() >= 8 {
                area[..4].copy_from_slice(&AREA_MAGIC.to_le_bytes());
                let length = (area.len() - 8) as u32;
                area[4..8].copy_from_slice(&length.to_le_bytes());
            }
            if let Ok(identity) = Identity::decode(&area) {
                prop_assert_eq!(&identity.encode(usize::MAX).unwrap()[..8], &area[..8]);
            }
        }
    }
}
