//! What goes wrong in a chat template, and how it is said.

use pivotal_data::{ChatTemplate, Date, Message};

fn chat(roles: &[&str]) -> Vec<Message> {
    let message = |role: &&str| Message {
        role: (*role).into(),
        content: "x".into(),
    };
    roles.iter().map(message).collect()
}

fn failure(source: &str, roles: &[&str]) -> String {
    match ChatTemplate::new("model/chat_template", source, None, None) {
        Ok(template) => template.render(&chat(roles), true).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn errors_name_the_template_the_line_and_the_message() {
    let alternate = "{% for m in messages %}\n{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\n\
        {{ raise_exception('roles must alternate') }}\n{% endif %}\n{% endfor %}";
    let messages = [
        failure(alternate, &["user", "assistant", "assistant", "user"]),
        failure("{% for m in messages %}", &["user"]),
        failure("{{ messages[0].tool.name }}", &["user"]),
        failure("{{ no_such_function() }}", &["user"]),
        failure("{{ strftime_now('%Y') }}", &["user"]),
        failure(
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            &["user"],
        ),
    ];
    insta::assert_snapshot!(messages.join("\n"), @r#"
chat template `model/chat_template`, line 3, message 2: roles must alternate
chat template `model/chat_template`, line 1: unexpected end of input, expected end of block
chat template `model/chat_template`, line 1, message 0: `messages[0].tool` is undefined
chat template `model/chat_template`, line 1, message 0: no_such_function is unknown
chat template `model/chat_template`, line 1, message 0: strftime_now is unknown; give the template a date (`with_date`)
chat template `model/chat_template`, line 1, message 0: engine ran out of fuel
"#);
}

#[test]
fn the_date_is_given_and_never_todays() {
    let source = "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}";
    let template = ChatTemplate::new("dated", source, None, None).unwrap();
    assert_eq!(
        template.render(&chat(&["user"]), false).unwrap(),
        "26 Jul 2024"
    );
    let without_date = template.identity();
    let template = template.with_date(Date::new(2026, 3, 1).unwrap());
    assert_eq!(
        template.render(&chat(&["user"]), false).unwrap(),
        "01 Mar 2026"
    );
    assert_ne!(template.identity(), without_date);
    assert_eq!(
        Date::new(2000, 1, 1).unwrap().format("%A").as_deref(),
        Some("Saturday")
    );
    assert_eq!(
        Date::new(2026, 11, 23)
            .unwrap()
            .format("%a %e.%m.%y %%")
            .as_deref(),
        Some("Mon 23.11.26 %")
    );
}
