//! Who listens for connections in the guest.

use std::fs;

/// The state of a socket that listens, in the kernel's tables (`TCP_LISTEN`).
const LISTENS: &str = "0A";

/// An error if nobody listens on this TCP port.
pub fn find(port: u16) -> Result<(), String> {
    let listens = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .any(|table| has_listener(&table, port));
    match listens {
        true => Ok(()),
        false => Err(format!("nobody listens on port {port}")),
    }
}

/// Looks through lines `NUMBER: ADDRESS:PORT REMOTE STATE ...`, numbers in hexadecimal digits.
fn has_listener(table: &str, port: u16) -> bool {
    table.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (Some(local), Some(_), Some(state)) = (words.next(), words.next(), words.next()) else {
            return false;
        };
        let of = local
            .rsplit(':')
            .next()
            .and_then(|digits| u16::from_str_radix(digits, 16).ok());
        state == LISTENS && of == Some(port)
    })
}

#[cfg(test)]
mod tests {
    use super::has_listener;

    #[test]
    fn only_a_socket_that_listens_counts() {
        let table = "  sl  local_address rem_address   st tx_queue\n   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n   \
                     1: 0100007F:0050 0100007F:C350 01 00000000:00000000\n";
        assert!(has_listener(table, 8080));
        assert!(!has_listener(table, 80));
        assert!(!has_listener("", 0));
    }
}
