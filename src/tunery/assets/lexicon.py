"""Words and sentence patterns of the clinical-trial world: everything here was written for Tunery.

A *concept* is a list of aligned (English, Chinese) variants; the first is the usual one. Without a given
term the translation of variant i is variant i of the other language; a given term may pair any two of them.
A *pattern* is an (English, Chinese) pair with slots: `{kind}`, `{kind2}` (a second slot of that kind),
`{kind+s}` (English plural), `{a kind}` (with its article). `{par}` is a place where a bracket may stand.
"""

from __future__ import annotations

import re

SLOT = re.compile(r"\{(a )?([a-z]+)(\d?)(\+s)?\}")  # article, kind, number, plural


def slots_of(pattern: str) -> list[tuple[str, str]]:
    """(name, kind) of each slot: "{drug2}" is ("drug2", "drug")."""
    return [(m[2] + m[3], m[2]) for m in SLOT.finditer(pattern)]


# fmt: off
Concept = list[tuple[str, str]]

# One concept per slot kind: the recurring nouns of a trial document.
NOUNS: dict[str, Concept] = {
    "subj": [("subject", "受试者"), ("participant", "参与者"), ("patient", "患者"), ("volunteer", "志愿者")],
    "inv": [("investigator", "研究者"), ("study doctor", "研究医生"), ("physician", "医师")],
    "site": [("site", "研究中心"), ("center", "中心"), ("hospital", "医院"), ("clinic", "诊所")],
    "study": [("study", "研究"), ("trial", "试验"), ("clinical study", "临床研究")],
    "sponsor": [("sponsor", "申办方"), ("sponsor company", "申办公司"), ("study owner", "项目方")],
    "visit": [("visit", "访视"), ("follow-up", "随访"), ("check-up", "复查")],
    "ae": [("adverse event", "不良事件"), ("side effect", "副作用"), ("adverse reaction", "不良反应")],
    "protocol": [("protocol", "方案"), ("study plan", "研究计划"), ("trial protocol", "试验方案")],
    "consent": [("informed consent", "知情同意书"), ("consent form", "同意书"),
                ("consent document", "同意文件")],
    "ec": [("ethics committee", "伦理委员会"), ("review board", "审查委员会"),
           ("ethics board", "伦理审查会")],
    "crf": [("case report form", "病例报告表"), ("record form", "记录表"), ("data sheet", "数据表")],
    "monitor": [("monitor", "监查员"), ("study monitor", "研究监查员"), ("auditor", "稽查员")],
    "nurse": [("nurse", "护士"), ("study nurse", "研究护士"), ("research nurse", "科研护士")],
    "contract": [("contract", "合同"), ("agreement", "协议"), ("service order", "服务订单")],
    "dev": [("protocol deviation", "方案偏离"), ("deviation", "偏离"), ("plan violation", "计划违背")],
    "sample": [("blood sample", "血样"), ("blood specimen", "血液标本"), ("sample", "样本")],
    "base": [("baseline", "基线"), ("study start", "研究开始"), ("screening", "筛选")],
}

# Groups: a slot of this kind takes one concept out of many.
GROUPS: dict[str, list[Concept]] = {
    "sym": [
        [("headache", "头痛"), ("head pain", "头部疼痛")],
        [("nausea", "恶心"), ("queasiness", "反胃")],
        [("fatigue", "乏力"), ("tiredness", "疲劳")],
        [("fever", "发热"), ("high temperature", "发烧")],
        [("rash", "皮疹"), ("skin eruption", "疹子")],
        [("dizziness", "头晕"), ("vertigo", "眩晕")],
        [("cough", "咳嗽"), ("coughing", "干咳")],
        [("insomnia", "失眠"), ("sleeplessness", "睡眠障碍")],
        [("back pain", "背痛"), ("backache", "腰背疼痛")],
        [("itching", "瘙痒"), ("pruritus", "皮肤痒")],
        [("anemia", "贫血"), ("low blood count", "血象偏低")],
        [("edema", "水肿"), ("swelling", "肿胀")],
    ],
    "dis": [
        [("type 2 diabetes", "2型糖尿病"), ("adult diabetes", "成人糖尿病")],
        [("asthma", "哮喘"), ("bronchial asthma", "支气管哮喘")],
        [("lung cancer", "肺癌"), ("lung tumor", "肺部肿瘤")],
        [("heart failure", "心力衰竭"), ("cardiac failure", "心衰")],
        [("arthritis", "关节炎"), ("joint inflammation", "关节发炎")],
        [("depression", "抑郁症"), ("major depression", "重度抑郁")],
    ],
    "test": [
        [("hemoglobin", "血红蛋白"), ("blood hemoglobin", "血色素")],
        [("platelet count", "血小板计数"), ("thrombocyte count", "血小板数")],
        [("creatinine", "肌酐"), ("serum creatinine", "血清肌酐")],
        [("fasting glucose", "空腹血糖"), ("blood sugar", "血糖")],
        [("body weight", "体重"), ("weight", "体重值")],
        [("heart rate", "心率"), ("pulse rate", "脉率")],
    ],
    "sev": [
        [("mild", "轻度"), ("slight", "轻微")],
        [("moderate", "中度"), ("medium", "中等")],
        [("severe", "重度"), ("serious", "严重")],
    ],
    "city": [[p] for p in [
        ("Beijing", "北京"), ("Shanghai", "上海"),
        ("Guangzhou", "广州"), ("Chengdu", "成都"), ("Wuhan", "武汉"),
        ("Hangzhou", "杭州"), ("Nanjing", "南京"),
        ("Boston", "波士顿"), ("Berlin", "柏林"), ("Madrid", "马德里"),
        ("Seoul", "首尔"), ("Oslo", "奥斯陆"), ("Toronto", "多伦多"), ("Geneva", "日内瓦"),
    ]],
    "route": [[p] for p in [
        ("orally", "口服"), ("by injection", "注射"),
        ("by infusion", "静脉输注"), ("under the skin", "皮下给药"),
        ("through a patch", "贴剂给药"), ("by inhalation", "吸入"),
    ]],
    "freq": [[p] for p in [
        ("once daily", "每日1次"), ("once weekly", "每周1次"), ("every morning", "每天早晨"),
        ("every evening", "每天晚上"), ("before meals", "餐前"),
        ("after meals", "餐后"), ("at bedtime", "睡前"),
    ]],
    "outc": [[p] for p in [
        ("recovered", "已康复"), ("improved", "好转"), ("did not change", "没有变化"),
        ("got worse", "加重"), ("resolved without treatment", "未经治疗即消失"), ("persisted", "持续存在"),
    ]],
    "rel": [[p] for p in [
        ("related to", "有关"), ("not related to", "无关"), ("possibly related to", "可能有关"),
        ("probably related to", "很可能有关"), ("unlikely to be related to", "不太可能有关"),
    ]],
    "way": [[p] for p in [("rose", "升高"), ("fell", "降低"), ("improved", "改善"), ("changed", "变化")]],
    "pay": [[p] for p in [
        ("travel", "交通"), ("laboratory tests", "实验室检查"), ("data entry", "数据录入"),
        ("drug storage", "药品储存"), ("imaging", "影像检查"), ("training", "培训"), ("shipping", "运输"),
        ("statistical analysis", "统计分析"), ("archiving", "归档"), ("insurance", "保险"),
    ]],
    "sex": [[p] for p in [("male", "男性"), ("female", "女性")]],
}

# Drug names are invented: two syllables and an ending, each with a usual and a second Chinese character.
SYLLABLES = [
    ("ve", "维", "韦"), ("lo", "洛", "罗"), ("ri", "瑞", "利"), ("ta", "他", "塔"), ("mi", "米", "咪"),
    ("na", "那", "纳"), ("do", "多", "度"), ("ka", "卡", "佧"), ("su", "苏", "舒"), ("fe", "非", "菲"),
    ("pa", "帕", "派"), ("go", "戈", "果"),
]
ENDINGS = [("mab", "单抗"), ("nib", "替尼"), ("tide", "肽"),
("zole", "唑"), ("pril", "普利"), ("statin", "他汀")]
# (syllable, syllable, ending) of the drugs that exist in this world
DRUGS = [(i % 12, (5 * i + 3 + 2 * (i // 12)) % 12, i % 6) for i in range(24)]

PATTERNS: list[tuple[str, str]] = [
    ("{subj} {sid} received {dose} of {drug} on {date}{par}.",
     "{subj}{sid}于{date}接受了{dose}{drug}{par}。"),
    ("the {inv} reported {n} {ae+s} at the {site} in {city}{par}.",
     "{city}{site}的{inv}报告了{n}起{ae}{par}。"),
    ("the {subj} developed {sev} {sym} {n} days after taking {drug}{par}.",
     "{subj}在服用{drug}{n}天后出现{sev}{sym}{par}。"),
    ("{count} {subj+s} were enrolled in the {study} by {date}{par}.",
     "截至{date}，共有{count}名{subj}入组该{study}{par}。"),
    ("the {sponsor} will pay the {site} {money} for {pay}{par}.",
     "{sponsor}将向{site}支付{money}的{pay}费用{par}。"),
    ("the {consent} was signed on {date} at {time}{par}.", "{consent}于{date}{time}签署{par}。"),
    ("the mean {test} {way} by {pct} from {base}{par}.", "平均{test}较{base}{way}{pct}{par}。"),
    ("{drug} should be taken {route} {freq} for {n} weeks.", "{drug}应{freq}{route}，持续{n}周。"),
    ("the {ec} approved the {protocol} on {date}{par}.", "{ec}于{date}批准了{protocol}{par}。"),
    ("{n} {subj+s} withdrew from the {study} because of {sym}{par}.",
     "{n}名{subj}因{sym}退出{study}{par}。"),
    ("the {ae} was {rel} {drug} and {outc}.", "该{ae}与{drug}{rel}，{outc}。"),
    ("each {subj} must complete {n} {visit+s} within {n2} months{par}.",
     "每名{subj}须在{n2}个月内完成{n}次{visit}{par}。"),
    ("the {nurse} collected {n} {sample+s} from {subj} {sid} at {time}.",
     "{nurse}于{time}从{subj}{sid}处采集了{n}份{sample}。"),
    ("the {test} was {lab} at {base} and {lab2} after {n} weeks{par}.",
     "{test}在{base}时为{lab}，{n}周后为{lab2}{par}。"),
    ("the {contract} between the {sponsor} and the {site} ends on {date}.",
     "{sponsor}与{site}之间的{contract}将于{date}到期。"),
    ("the {monitor} found {n} {dev+s} at the {site} on {date}{par}.",
     "{monitor}于{date}在{site}发现{n}项{dev}{par}。"),
    ("the {crf} of {subj} {sid} was completed on {date}{par}.", "{subj}{sid}的{crf}于{date}完成{par}。"),
    ("the {study} enrolls {sex} {subj+s} aged {age} to {top} years with {dis}{par}.",
     "该{study}招募{age}至{top}岁的{sex}{dis}{subj}{par}。"),
    ("in case of {sym}, the {inv} should reduce {drug} to {dose}{par}.",
     "若出现{sym}，{inv}应将{drug}减至{dose}{par}。"),
    ("the {subj} must not take {drug} within {n} weeks before the {visit}{par}.",
     "{subj}在{visit}前{n}周内不得服用{drug}{par}。"),
    ("a {sex} {subj} aged {age} with {dis} received {drug}{par}.",
     "1名{age}岁的{sex}{dis}{subj}接受了{drug}{par}。"),
    ("{pct} of the {subj+s} in the {drug} group had {sym}{par}.",
     "{drug}组中{pct}的{subj}出现{sym}{par}。"),
    ("the {visit} is planned for {date} at {time} in {city}.", "{visit}计划于{date}{time}在{city}进行。"),
    ("please record every {ae} in the {crf} within {hours} hours{par}.",
     "请在{hours}小时内将每起{ae}记录在{crf}中{par}。"),
    ("the {dose} of {drug} was well tolerated by {count} {subj+s}{par}.",
     "{count}名{subj}对{dose}{drug}耐受良好{par}。"),
    ("the {ae} of {subj} {sid} started on {date} and {outc}{par}.",
     "{subj}{sid}的{ae}始于{date}，{outc}{par}。"),
    ("compared with {drug2}, {drug} reduced {sym} by {pct}{par}.",
     "与{drug2}相比，{drug}使{sym}减少{pct}{par}。"),
    ("the {sample} must reach the laboratory in {city} before {time}{par}.",
     "{sample}须在{time}前送达{city}的实验室{par}。"),
    ("the invoice of {money} is due on {date}{par}.", "金额为{money}的发票应于{date}支付{par}。"),
    ("tell the {inv} at once if you have {sym} or {sym2}{par}.",
     "如果您出现{sym}或{sym2}，请立即告知{inv}{par}。"),
    ("{subj} {sid} was randomized to the {drug} group on {date}{par}.",
     "{subj}{sid}于{date}被随机分入{drug}组{par}。"),
]

# Openings that many patterns may take, in front in both languages.
OPENINGS: list[tuple[str, str]] = [
    ("according to the {protocol9}, ", "根据{protocol9}，"),
    ("as of {date9}, ", "截至{date9}，"),
    ("in {city9}, ", "在{city9}，"),
    ("in addition, ", "此外，"),
]

# What may stand in a bracket.
BRACKETS: list[tuple[str, str]] = [
    ("Visit {num8}", "访视{num8}"), ("n = {num8}", "n = {num8}"), ("Day {num8}", "第{num8}天"),
    ("batch {code8}", "批号{code8}"), ("see Table {num8}", "见表{num8}"), ("{drug8} group", "{drug8}组"),
    ("since {date8}", "自{date8}起"), ("about {money8}", "约{money8}"), ("{code8}", "{code8}"),
]
