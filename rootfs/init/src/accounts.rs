//! Users and groups of the image: `/etc/passwd` and `/etc/group`, read as Docker reads them.

// What a guest or a file says must not end this process.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use std::fs;

/// Largest numeric id that is accepted, as Docker has it.
const ID_MAX: u32 = i32::MAX as u32;

/// The image's account files, read once before the freeze. An image may have neither.
#[derive(Default)]
pub struct Accounts {
    passwd: Vec<u8>,
    group: Vec<u8>,
}

/// Whom a container runs as.
#[derive(Debug, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
    /// Home directory; `/` for a user without an entry.
    pub home: Vec<u8>,
}

impl Accounts {
    /// Reads the account files; one that is missing is empty.
    pub fn read() -> Self {
        Self {
            passwd: fs::read("/etc/passwd").unwrap_or_default(),
            group: fs::read("/etc/group").unwrap_or_default(),
        }
    }

    /// The same of files that were read already.
    #[cfg(fuzzing)]
    pub fn from_files(passwd: Vec<u8>, group: Vec<u8>) -> Self {
        Self { passwd, group }
    }

    #[cfg(test)]
    pub fn new(passwd: &str, group: &str) -> Self {
        Self {
            passwd: passwd.into(),
            group: group.into(),
        }
    }

    /// Resolves `user[:group]`, each a name or a number; empty is root. A named user, or a number that has an entry,
    /// brings its primary group and the groups that list it; an explicit group replaces all of them.
    ///
    /// # Errors
    /// The sentence for people if there is no such user or group.
    pub fn resolve(&self, spec: &[u8]) -> Result<Account, String> {
        let mut parts = spec.splitn(2, |&byte| byte == b':');
        let (user, group) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let mut account = Account {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: b"/".to_vec(),
        };
        let number = if user.is_empty() { Some(0) } else { number(user) };
        let entry = records(&self.passwd).find_map(|fields| {
            let &[name, _, uid, gid, _, home, ..] = fields.as_slice() else {
                return None;
            };
            let (uid, gid) = (parse_id(uid)?, parse_id(gid)?);
            let found = name == user || number.is_some_and(|number| number == i64::from(uid));
            found.then_some((name, uid, gid, home))
        });
        match (entry, number) {
            (Some((_, uid, gid, home)), _) => {
                (account.uid, account.gid) = (uid, gid);
                if !home.is_empty() {
                    account.home = home.to_vec();
                }
            }
            (None, Some(number)) => account.uid = in_range(number)?,
            (None, None) => {
                return Err(format!(
                    "the image's /etc/passwd has no user {}",
                    String::from_utf8_lossy(user)
                ));
            }
        }
        if !group.is_empty() {
            account.gid = self.group_id(group)?;
        } else if let Some((name, ..)) = entry {
            account.groups = self.groups_of(name);
        }
        Ok(account)
    }

    /// Resolves a group, a name or a number.
    ///
    /// # Errors
    /// The sentence for people if there is no such group.
    pub fn group_id(&self, group: &[u8]) -> Result<u32, String> {
        let number = number(group);
        let entry = records(&self.group).find_map(|fields| {
            let &[name, _, gid, ..] = fields.as_slice() else {
                return None;
            };
            let gid = parse_id(gid)?;
            (name == group || number.is_some_and(|number| number == i64::from(gid))).then_some(gid)
        });
        match (entry, number) {
            (Some(gid), _) => Ok(gid),
            (None, Some(number)) => in_range(number),
            (None, None) => Err(format!(
                "the image's /etc/group has no group {}",
                String::from_utf8_lossy(group)
            )),
        }
    }

    /// Name of the user with this number, or the number.
    pub fn user_name(&self, uid: u32) -> Vec<u8> {
        let name = records(&self.passwd).find_map(|fields| {
            let &[name, _, number, ..] = fields.as_slice() else {
                return None;
            };
            (parse_id(number) == Some(uid)).then(|| name.to_vec())
        });
        name.unwrap_or_else(|| uid.to_string().into_bytes())
    }

    fn groups_of(&self, user: &[u8]) -> Vec<u32> {
        records(&self.group)
            .filter_map(|fields| {
                let &[_, _, gid, members, ..] = fields.as_slice() else {
                    return None;
                };
                let listed = members.split(|&byte| byte == b',').any(|member| member == user);
                listed.then(|| parse_id(gid)).flatten()
            })
            .collect()
    }
}

/// Lines of colon-separated fields, without comments.
fn records(file: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    file.split(|&byte| byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty() && !line.starts_with(b"#"))
        .map(|line| line.split(|&byte| byte == b':').collect())
}

fn number(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn parse_id(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn in_range(number: i64) -> Result<u32, String> {
    u32::try_from(number)
        .ok()
        .filter(|&id| id <= ID_MAX)
        .ok_or_else(|| format!("the id {number} is not between 0 and {ID_MAX}"))
}

#[cfg(test)]
mod tests {
    use super::{Account, Accounts};

    fn accounts() -> Accounts {
        Accounts::new(
            "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken line\ndaemon:x:1:1::/usr/sbin:/bin/false\n\
             me:x:1000:1001:Me,,,:/home/me:/bin/sh\n42:x:77:78::/home/numbered:/bin/sh\n",
            "root:x:0:\nadm:x:4:me,daemon\nwheel:x:10:daemon,me\nusers:x:1001:\nbad:x:many:me\n",
        )
    }

    fn account(uid: u32, gid: u32, groups: &[u32], home: &str) -> Account {
        Account {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.into(),
        }
    }

    #[test]
    fn nobody_in_particular_is_root() {
        assert_eq!(accounts().resolve(b""), Ok(account(0, 0, &[], "/root")));
        assert_eq!(
            Accounts::default().resolve(b""),
            Ok(account(0, 0, &[], "/")),
            "an image without account files"
        );
    }

    #[test]
    fn a_user_brings_its_groups_and_home() {
        let me = account(1000, 1001, &[4, 10], "/home/me");
        assert_eq!(accounts().resolve(b"me"), Ok(me));
        let by_number = accounts().resolve(b"1000").unwrap();
        assert_eq!(by_number.groups, [4, 10]);
    }

    #[test]
    fn an_explicit_group_replaces_the_users_groups() {
        assert_eq!(
            accounts().resolve(b"me:adm"),
            Ok(account(1000, 4, &[], "/home/me"))
        );
        assert_eq!(
            accounts().resolve(b"me:555"),
            Ok(account(1000, 555, &[], "/home/me"))
        );
        assert_eq!(accounts().resolve(b":adm"), Ok(account(0, 4, &[], "/root")));
    }

    #[test]
    fn a_number_needs_no_entry_and_a_name_of_digits_is_a_name() {
        assert_eq!(accounts().resolve(b"12345"), Ok(account(12345, 0, &[], "/")));
        assert_eq!(accounts().resolve(b"42").unwrap().uid, 77);
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_errors() {
        assert!(accounts().resolve(b"ghost").unwrap_err().contains("ghost"));
        assert!(accounts().resolve(b"me:ghosts").unwrap_err().contains("ghosts"));
        assert!(accounts().resolve(b"-1").unwrap_err().contains("between"));
        assert!(accounts().resolve(b"4294967295").unwrap_err().contains("between"));
        assert!(accounts().resolve(b"\xff").is_err());
    }
}
